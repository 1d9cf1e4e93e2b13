"""Weights in and out: official, diffusers, flexidit and training checkpoints; local paths and hub ids.

A flexidit checkpoint is one safetensors file whose header carries the model's config as json: one file cannot be half
of a pair. Nothing here unpickles code: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexidit.config import DiTConfig, config_from_dict, config_to_dict
from flexidit.files import replacing
from flexidit.layouts import dit as layout
from flexidit.models.dit import DiT
from flexidit.recipes import flexify

Format = Literal["flexidit", "official", "diffusers"]

_HEADER_KEY = "flexidit"
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_checkpoint(path: str | Path, *, prefer_ema: bool = True, **overrides: Any) -> DiT:
    """A model with the weights and the config that a checkpoint holds, in eval mode, on the CPU.

    Args:
        path: a flexidit ``.safetensors``; a training ``.ckpt``; an official ``.pt`` or ``.pth``, flat or wrapped as
            ``{"model", "ema"}``; a diffusers directory, of the transformer or of its pipeline; or a hub id of one.
        prefer_ema: take the averaged weights where a checkpoint has both.
        **overrides: for official weights, what no shape tells: ``num_heads``, a non-square ``input_size``.

    Raises:
        FileNotFoundError: neither a path nor a hub id that can be had.
        ValueError: a file that is damaged, unsafe, or not a model known here; the sentence names it.
    """
    path = _resolve(path)
    if path.is_dir():
        return _load_diffusers(path)
    if path.suffix == ".safetensors":
        return _load_flexidit(path, overrides)
    values = _load_pickle(path)
    if "state_dict" in values and "flexidit" in values:
        return _load_training(values, path, prefer_ema)
    state = _unwrap(values, prefer_ema)
    return _fill(layout.config_from_official(state, **overrides), state, path)


def save_checkpoint(model: DiT, path: str | Path, *, layout_format: Format = "flexidit") -> Path:
    """Write a model's weights so that a reader sees the whole file or none of it.

    Args:
        model: any model of ours; the other layouts take models with one patch size.
        path: a ``.safetensors`` file ("flexidit"), a ``.pt`` file ("official") or a directory ("diffusers").

    Returns:
        The file or directory that was written.
    """
    path = Path(path)
    if layout_format == "flexidit":
        header = {_HEADER_KEY: json.dumps(config_to_dict(model.config))}
        return _save_safetensors(model.state_dict(), path, header)
    if model.config.flex is not None:
        raise ValueError(
            f"the {layout_format} layout has one patch size; take one of this model first "
            "(lora: merge a weak size, shared: pick any size)"
        )
    if layout_format == "official":
        with replacing(path) as temporary:
            torch.save(model.state_dict(), temporary)
        return path
    return _save_diffusers(model, path)


def build(config: DiTConfig) -> DiT:
    """A model, plain or flexible, with the structure that a config describes and fresh weights."""
    model = DiT(replace(config, flex=None))
    if config.flex is None:
        return model
    flex = config.flex
    return flexify(
        model,
        flex.weak_patch_sizes,
        flex.recipe,
        underlying_patch_size=flex.underlying_patch_size,
        size_norms=flex.size_norms,
        positions=flex.positions,
        rank=flex.rank or 1,
        alpha=flex.alpha,
        keep_target=False,
    )


def _fill(config: DiTConfig, state: Mapping[str, Tensor], source: Path) -> DiT:
    """Build on the meta device and put the tensors in place: nothing is initialised only to be overwritten."""
    with torch.device("meta"):
        model = build(config)
    try:
        model.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{source} does not fit the model it says it holds: {problem}") from None
    model.pos_embed.requires_grad_(False)
    model.reset_derived()
    return model.eval()


def _load_flexidit(path: Path, overrides: Mapping[str, Any]) -> DiT:
    state, header = read_safetensors(path)
    if _HEADER_KEY not in header:
        return _fill(layout.config_from_official(state, **overrides), state, path)
    return _fill(config_from_dict(json.loads(header[_HEADER_KEY])), state, path)


def _load_training(values: Mapping[str, Any], path: Path, prefer_ema: bool) -> DiT:
    state = _model_tensors(values["state_dict"])
    average = values.get("callbacks", {}).get("EMA", {}).get("average", {})
    if prefer_ema:
        state.update({name: tensor.to(state[name].dtype) for name, tensor in _model_tensors(average).items()})
    return _fill(config_from_dict(values["flexidit"]["config"]), state, path)


def _model_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a Lightning module keeps under ``model.``, wrappers of compilation and checkpointing taken off."""
    bare = {re.sub(r"_orig_mod\.|_checkpoint_wrapped_module\.", "", name): value for name, value in tensors.items()}
    return {name.removeprefix("model."): value for name, value in bare.items() if name.startswith("model.")}


def _unwrap(values: Mapping[str, Any], prefer_ema: bool) -> dict[str, Tensor]:
    """The state dict of DiT's training checkpoints (``model`` and ``ema``), or a flat one as it is."""
    names = ("ema", "model") if prefer_ema else ("model", "ema")
    for name in names:
        if isinstance(values.get(name), Mapping):
            return dict(values[name])
    return dict(values)


def _load_diffusers(path: Path) -> DiT:
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a directory that diffusers' save_pretrained wrote")
    values = json.loads(config_file.read_text())
    if values.get("_class_name") != "DiTTransformer2DModel":
        raise ValueError(f"{config_file} describes a {values.get('_class_name')}; known is DiTTransformer2DModel")
    config = layout.config_from_diffusers(values)
    state = layout.from_diffusers(_diffusers_tensors(folder), config.depth)
    table = DiT(replace(config, depth=0)).pos_embed.detach()  # not in diffusers' file: it follows from the config
    return _fill(config, {**state, "pos_embed": table}, folder)


def _diffusers_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, be they in one safetensors file, in several, or in the older ``.bin``."""
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in read_safetensors(file)[0].items()}
    legacy = folder / "diffusion_pytorch_model.bin"
    if legacy.is_file():
        return dict(_load_pickle(legacy))
    raise FileNotFoundError(f"{folder} has no diffusion_pytorch_model.safetensors")


def _save_diffusers(model: DiT, folder: Path) -> Path:
    values = {"_class_name": "DiTTransformer2DModel", **layout.config_to_diffusers(model.config)}
    state = layout.to_diffusers(model.state_dict(), model.config.depth)
    folder.mkdir(parents=True, exist_ok=True)
    _save_safetensors(state, folder / _DIFFUSERS_WEIGHTS, {"format": "pt"})
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")
    return folder


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


def _save_safetensors(state: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> Path:
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    return path


def _load_pickle(path: Path) -> Mapping[str, Any]:
    """Read a ``.pt``, ``.pth`` or ``.ckpt`` without running code from it."""
    try:
        # DiT's own training checkpoints hold the command line as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds objects that only running its code could rebuild, which is refused; "
            "export its weights as safetensors or as a plain state dict"
        ) from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a dictionary of tensors")
    return values


def _resolve(path: str | Path) -> Path:
    """A local path, or what the hub has under ``owner/name``."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["config.json", "transformer/config.json", "*diffusion_pytorch_model*"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{path} is neither a file here nor a model that the hub gives now ({reason}); give a local path"
        ) from None
