"""The text encoder of commands that sample: found, checked against the model, and compared with that of training."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexidit.commands.sampling_setup import LoadedModel

if TYPE_CHECKING:
    from flexidit.config import CaptionedConfig
    from flexidit.text import CaptionEncoder, TextDtype

_WORDS = "WordEncoder"  # class of its fingerprint


def add_text_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare what turns prompts into captions."""
    group.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="folder or hub id of the T5 that the model was trained with, or of its pipeline; 'words' for "
        "demonstrations (default: what a training checkpoint records, where that needs no weights)",
    )
    group.add_argument("--tokenizer", metavar="PATH", help="folder or hub id, where it is not beside the text encoder")
    group.add_argument(
        "--negative",
        metavar="TEXT",
        help="prompt to guide away from (default: the weights' null caption, or the empty prompt if they have none)",
    )


def open_text_encoder(name: str | None, tokenizer: str | None, loaded: LoadedModel) -> CaptionEncoder:
    """The text encoder of a name, on the model's device; without a name, that of training if it has no weights.

    "words" is a ``WordEncoder`` that fits the model. What training recorded is compared, and a difference is told on
    standard error.

    Raises:
        FileNotFoundError, ValueError: it cannot be had, or is not the model's.
    """
    recorded, config = loaded.text or {}, loaded.model.config
    if name in (None, "words") and recorded.get("class") == _WORDS:
        encoder = _recorded_words(recorded)
    elif name is None:
        raise ValueError(_what_to_give(recorded))
    else:
        encoder = _named(name, tokenizer, loaded)
    _check_fits(encoder, name or "that training recorded", config)
    if not is_recorded(encoder.fingerprint, recorded):
        _warn(f"the model was trained with another text encoder than {name}; expect pictures that ignore the prompts")
    return encoder


def is_recorded(fingerprint: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Whether it may be the encoder of training: nothing that both say differs.

    Captions are cut at another length without being others, and weights of another type have another hash.
    """
    ignored = {"max_length"}
    if recorded.get("dtype") != fingerprint.get("dtype"):
        ignored |= {"dtype", "weights_sha256"}
    common = (fingerprint.keys() & recorded.keys()) - ignored
    return all(fingerprint[name] == recorded[name] for name in common)


def warn_of_cut(texts: Sequence[str], encoder: CaptionEncoder) -> None:
    """Say on standard error which prompts lose their ends."""
    for text, is_cut in zip(texts, encoder.truncated(texts), strict=True):
        if is_cut:
            shown = textwrap.shorten(text, 80, placeholder=" ...")
            _warn(f"only the first {encoder.max_length} tokens are read of: {shown}")


def _recorded_words(recorded: Mapping[str, Any]) -> CaptionEncoder:
    from flexidit.text import WordEncoder

    return WordEncoder(recorded["width"], recorded["max_length"], recorded["seed"])


def _named(name: str, tokenizer: str | None, loaded: LoadedModel) -> CaptionEncoder:
    from flexidit.text import make_text_encoder

    config: CaptionedConfig = loaded.model.config
    if name == "words":
        name = f"words:{config.caption_channels}x{config.caption_length}"
    dtype: TextDtype = (loaded.text or {}).get("dtype", "bfloat16")
    return make_text_encoder(
        name,
        tokenizer=tokenizer,
        device=loaded.device,
        dtype=dtype,
        max_length=None if name.startswith("words:") else config.caption_length,
        batch_size=8 if loaded.device.type == "cpu" else 64,
    )


def _check_fits(encoder: CaptionEncoder, name: str, config: CaptionedConfig) -> None:
    if encoder.width != config.caption_channels:
        raise ValueError(
            f"the text encoder {name} gives embeddings of width {encoder.width} and the model reads "
            f"{config.caption_channels}; give the one that the model was trained with"
        )
    if encoder.max_length > config.caption_length:
        raise ValueError(
            f"the text encoder {name} makes captions of {encoder.max_length} tokens and the model reads "
            f"{config.caption_length}; give the one that the model was trained with"
        )


def _what_to_give(recorded: Mapping[str, Any]) -> str:
    known = f" (a {recorded['class']} of width {recorded['width']})" if {"class", "width"} <= recorded.keys() else ""
    return f"prompts need --text-encoder, the folder or hub id of the one that the model was trained with{known}"


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)
