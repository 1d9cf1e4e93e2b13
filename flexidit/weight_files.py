"""Files of tensors: safetensors, pickles that run no code, diffusers directories, hub ids.

Nothing here unpickles code: safetensors, or ``torch.load(weights_only=True)``. What is written is whole or not there.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexidit.files import replacing
from flexidit.zip_records import check_records

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"

_FROM_HUB = ["config.json", "transformer/config.json", "*diffusion_pytorch_model*", "*null_caption.safetensors"]
_EXPORT_FROM_HUB = ["flexidit.json", "embeddings.safetensors", "*adapter_config.json", "*adapter_model.safetensors"]


def resolve(path: str | Path) -> Path:
    """A local path, or what the hub has under ``owner/name``.

    Raises:
        FileNotFoundError: neither can be had.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=_FROM_HUB + _EXPORT_FROM_HUB))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{path} is neither a file here nor a model that the hub gives now ({reason}); give a local path"
        ) from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); fetch or write it again") from None


def save_safetensors(state: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> Path:
    """Write tensors and a header of strings."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    return path


def load_pickle(path: Path, check_bytes: bool = True) -> Mapping[str, Any]:
    """Read a ``.pt``, ``.pth`` or ``.ckpt`` without running code from it.

    Args:
        path: the file; its tensors are read when they are used.
        check_bytes: compare all of it with the checksums in it, for 0.4 s a gigabyte; the older format has none.

    Raises:
        ValueError: the file is damaged, is none, or holds more than data.
    """
    is_zip = check_pickle(path)
    if is_zip and check_bytes:
        check_records(path)
    try:
        # DiT's own training checkpoints hold the command line as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds objects that only running its code could rebuild, which is refused; "
            "export its weights as safetensors or as a plain state dict"
        ) from None
    except Exception as error:  # whatever damaged bytes make torch do
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason})") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a dictionary of tensors")
    return values


def check_pickle(path: Path) -> bool:
    """Whether a file is in the zip format of ``torch.save``, and not the older one; looks at its ends only.

    Raises:
        ValueError: it is neither, or cut short.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if _is_zip(path):
        return True
    if start == b"PK":
        raise ValueError(f"{path} is damaged: its end is missing; fetch it again, or take an earlier one")
    if start[:1] != b"\x80":
        raise ValueError(f"{path} is not a checkpoint: torch.save did not write it")
    return False


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # what looks like its end contradicts itself
        return False


def save_pickle(state: Mapping[str, Tensor], path: Path) -> Path:
    """Write a flat ``.pt`` or ``.pth``."""
    with replacing(path) as temporary:
        torch.save(dict(state), temporary)
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object that a json file holds.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not json ({error}); fetch or write it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object")
    return values


def save_json(values: Mapping[str, Any], path: Path) -> Path:
    """Write an object, for people too."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def read_diffusers(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, be they in one safetensors file, in several, or in the older ``.bin``.

    Raises:
        FileNotFoundError: there are none, or not all that the index lists.
    """
    files = _listed(folder) or sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in read_safetensors(file)[0].items()}
    legacy = folder / "diffusion_pytorch_model.bin"
    if legacy.is_file():
        return dict(load_pickle(legacy))
    raise FileNotFoundError(f"{folder} has no {DIFFUSERS_WEIGHTS}")


def _listed(folder: Path) -> list[Path]:
    """The files of an index, which weights in several files have."""
    index = folder / f"{DIFFUSERS_WEIGHTS}.index.json"
    if not index.is_file():
        return []
    files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {missing[0]}, which its index lists; fetch it again")
    return files
