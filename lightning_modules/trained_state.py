"""Checkpoints of adapters: what trains, and the name of the base that it belongs to, instead of the base itself.

For PixArt-XL/2 with rank 32 that is 0.3 GB instead of 2.7 GB (weights, their average, two moments). What is left out
must be had again for a resume: it comes from ``target.checkpoint``, and is compared by hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from flexidit.checkpoint import read_any
from flexidit.config import config_to_dict
from flexidit.export import Adapters, BaseIdentity
from flexidit.identity import base_hash

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer
    from lightning_modules.base import DiffusionModule


def base_source(target: FlexiTransformer, checkpoint: str | None) -> str | None:
    """Where the base is that a target was read from: its checkpoint, or what that names instead of holding it."""
    if checkpoint is None or target.config.flex is None:
        return checkpoint
    found = read_any(checkpoint)
    return found.base.source if isinstance(found, Adapters) else checkpoint


def identify_base(model: FlexiTransformer, source: str | None) -> BaseIdentity | None:
    """The base of adapters; None where all weights train, or where a checkpoint must hold a random base itself."""
    flex = model.config.flex
    if source is None or flex is None or flex.recipe != "lora":
        return None
    return BaseIdentity(base_hash(model), source)


def keep_trained(state: dict[str, Any], module: nn.Module, prefix: str = "") -> dict[str, Any]:
    """Take everything of the module out of a state dict that does not train; returns the same dictionary."""
    trained = {prefix + name for name in trained_names(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in trained]:
        del state[name]
    return state


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that train."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_loadable(checkpoint: Mapping[str, Any], module: DiffusionModule, text: Mapping[str, Any] | None) -> None:
    """Refuse to resume adapters on another base than theirs, or with other adapters than those of the file.

    Raises:
        ValueError: the file's base is not ``target.checkpoint``, it has other adapters, or lacks some of their tensors.
    """
    said = checkpoint.get("flexidit", {})
    _check_base(said.get("base"), module.base_identity)
    if module.base_identity is not None:
        _check_flex(said["config"].get("flex"), config_to_dict(module.model.config)["flex"])
        if "state_dict" in checkpoint:  # ModelParallelStrategy has loaded it by now, and taken it out
            _check_names(checkpoint["state_dict"], trained_names(module))
    if text is not None and said.get("text") not in (None, text):
        rank_zero_warn("the checkpoint was trained with captions of another text encoder than the data have now")


def _check_base(saved: Mapping[str, str] | None, own: BaseIdentity | None) -> None:
    if saved is None and own is None:
        return
    if saved is None:
        raise ValueError(
            "the checkpoint holds a whole model and does not say which base its adapters belong to: resume with the "
            "config that it was trained with, or start anew from it with target.checkpoint"
        )
    if own is None:
        raise ValueError(
            f"the checkpoint holds adapters of {saved['source']} and not that base itself: set target.checkpoint to "
            "it, with recipe lora"
        )
    if saved["hash"] != own.hash:
        raise ValueError(
            f"the checkpoint's adapters belong to the base {saved['source']} (sha256 {saved['hash'][:12]}), but "
            f"target.checkpoint {own.source} holds another (sha256 {own.hash[:12]}): give the base they were trained on"
        )


def _check_flex(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    if differing:
        each = ", ".join(f"{name} {saved.get(name)} instead of {own.get(name)}" for name in differing)
        raise ValueError(f"the checkpoint's adapters are not those of the config, they have {each}: make both agree")


def _check_names(saved: Mapping[str, Any], own: set[str]) -> None:
    differing = sorted(own ^ saved.keys())
    if differing:
        kind = "lacks" if differing[0] in own else "has unknown"
        raise ValueError(
            f"the checkpoint and the model differ in {len(differing)} of the tensors that train, it {kind} "
            f"{differing[0]}: take a checkpoint of this recipe that is whole"
        )
