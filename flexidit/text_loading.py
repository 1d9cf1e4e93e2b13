"""Reading T5, or UMT5, and its tokenizer from a folder or the hub: safely, silently, with one sentence if it fails.

A source is a folder or a hub id, either of the thing itself or of a pipeline that has it in a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

EncoderKind = Literal["t5", "umt5"]
"""PixArt's text encoder, or the multilingual one of Wan."""


def encoder_kind(source: str | Path) -> EncoderKind:
    """Which of them a folder or the hub has, by its config; no weights are read.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_t5`.
    """
    return open_source(_read_kind, source, "text_encoder", ("config.json",), "T5 text encoder")


def load_t5(source: str | Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Read a frozen T5 or UMT5 encoder from a folder or the hub: safetensors, or tensors of a ``.bin`` without code.

    Raises:
        FileNotFoundError: if a path holds neither.
        ValueError: if it is another model, its weights are incomplete or damaged, or the hub cannot be reached.
    """

    def read(location: str, **options: Any) -> nn.Module:
        from transformers import T5EncoderModel, UMT5EncoderModel

        kind = UMT5EncoderModel if _read_kind(location, **options) == "umt5" else T5EncoderModel
        options |= {"torch_dtype": dtype, "weights_only": True, "output_loading_info": True}
        loaded: Any = kind.from_pretrained(location, **options)
        model, info = loaded
        if info["missing_keys"]:  # transformers would leave these at random values, with a warning only
            raise ValueError(f"its weights lack {len(info['missing_keys'])} tensors")
        return model.eval().requires_grad_(False)

    return open_source(read, source, "text_encoder", ("config.json",), "T5 text encoder")


def load_tokenizer(source: str | Path) -> Any:
    """Read a tokenizer from a folder or the hub.

    Raises:
        FileNotFoundError: if a path holds no tokenizer.
        ValueError: if it cannot be used, or the hub cannot be reached.
    """

    def read(location: str, **options: Any) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(location, padding_side="right", **options)
        # without vocabulary files transformers makes a tokenizer to which every word is unknown, and says nothing
        if tokenizer.unk_token_id in tokenizer("a").input_ids:
            raise OSError("it has no vocabulary")
        if not tokenizer("").input_ids:
            raise ValueError("it does not end texts with a token, so an empty caption would have none")
        return tokenizer

    files = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
    return open_source(read, source, "tokenizer", files, "tokenizer")


def _read_kind(location: str, **options: Any) -> EncoderKind:
    from transformers import T5Config

    kind = T5Config.get_config_dict(location, **options)[0].get("model_type")
    if kind not in ("t5", "umt5"):
        raise ValueError(f"its model_type is {kind!r}, not 't5' or 'umt5'")
    return cast(EncoderKind, kind)


def open_source(read: Callable[..., Any], source: str | Path, part: str, files: Sequence[str], noun: str) -> Any:
    """What ``read`` makes of a folder, or of a hub id, in both of their subfolder ``part`` if it is a pipeline."""
    folder = _local(source, part, files, noun)
    try:
        with _quiet():
            return _read_hub(read, str(source), part, files) if folder is None else _read_folder(read, folder)
    # readers report damage through many classes: safetensors' and pickle's own, KeyError, json's, ...
    except Exception as error:
        raise ValueError(_unavailable(source, folder, error, noun)) from error


def _local(source: str | Path, part: str, files: Sequence[str], noun: str) -> Path | None:
    """The folder that holds one of the files; None for a hub id. What looks like a path must exist."""
    path = Path(source).expanduser()
    if path.is_dir():
        for folder in (path / part, path):
            if any((folder / name).is_file() for name in files):
                return folder
        raise FileNotFoundError(f"no {noun} in {path}: expected {files[0]} in it or in its folder {part}")
    text = str(source)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(f"no {noun} at {text}: give its folder, or a hub id such as owner/name")
    return None


def _read_folder(read: Callable[..., Any], folder: Path) -> Any:
    return read(str(folder), local_files_only=True)


def _read_hub(read: Callable[..., Any], repository: str, part: str, files: Sequence[str]) -> Any:
    """From the hub's cache if it is there, which needs no network; else downloaded."""
    from huggingface_hub import file_exists

    for subfolder in (part, ""):
        with suppress(OSError):
            return read(repository, subfolder=subfolder, local_files_only=True)
    _ask_hub()
    is_pipeline = any(file_exists(repository, f"{part}/{name}") for name in files)
    return read(repository, subfolder=part if is_pipeline else "")


def _ask_hub() -> None:
    """One short request first: the libraries retry an unreachable hub for most of a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        raise OSError("the hub is switched off by HF_HUB_OFFLINE, and it is not in the cache")
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # classes of the http library, which changed with the hub's version
        raise OSError(f"{constants.ENDPOINT} cannot be reached, and it is not in the cache") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def _unavailable(source: str | Path, folder: Path | None, error: Exception, noun: str) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if "tiktoken" in first:  # what transformers asks for where it found no reader of sentencepiece files
        return f"the {noun} in {source} is a spiece.model: install its reader with `pip install sentencepiece`"
    if folder is None:
        return f"{source} is no local folder and the hub did not deliver a {noun} ({first}): give the path of a folder"
    return f"the {noun} in {folder} cannot be used ({first}): download it again, or give another folder"
