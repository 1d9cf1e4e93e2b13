"""Checkpoints of adapters: what trains, and the name of the base that it belongs to, instead of the base itself.

For PixArt-XL/2 with rank 32 that is 0.3 GB instead of 2.7 GB (weights, their average, two moments). What is left out
must be had again for a resume: it comes from ``target.checkpoint``, and is compared by hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from flexidit.checkpoint import read_any
from flexidit.export import Adapters, BaseIdentity
from flexidit.identity import base_hash

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer


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


def check_base(saved: Mapping[str, str] | None, own: BaseIdentity | None) -> None:
    """Refuse to resume adapters on another base than theirs.

    Raises:
        ValueError: the file's base is not ``target.checkpoint``, or one of both has none.
    """
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


def check_names(saved: Mapping[str, Any], own: set[str]) -> None:
    """Refuse a file that lacks some of the tensors that train, or has others: it would be loaded without a word.

    Raises:
        ValueError: naming the first of them.
    """
    differing = sorted(own ^ saved.keys())
    if differing:
        kind = "lacks" if differing[0] in own else "has unknown"
        raise ValueError(
            f"the checkpoint and the model differ in {len(differing)} of the tensors that train, it {kind} "
            f"{differing[0]}: take a checkpoint of this recipe that is whole"
        )
