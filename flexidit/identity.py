"""Which weights a model of the lora recipe stands on: its base's tensors, what was added to them, and a hash.

A checkpoint of adapters says by hash which base it belongs to, so that no other can be put under it without a word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer

_ADDED = re.compile(r"(^|\.)(lora_[AB]|per_size|size_embedder)\.")
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")


def base_hash(model: FlexiTransformer) -> str:
    """64 hexadecimal digits that change with any weight of the target under a model of the lora recipe.

    The same before and after ``flexify``, on any device, whether weights are frozen, compiled or sharded, and in any
    floating-point type that holds their values. Of sharded weights every rank must ask, as they are gathered one by
    one. Two gigabytes of weights take a few seconds.

    Positions that follow from the config are left out: the last bit of a sine depends on the machine.
    """
    return hash_tensors(base_tensors(model.state_dict()), computes_positions=model.config.computes_positions)


def hash_tensors(state: Mapping[str, Tensor], *, computes_positions: bool) -> str:
    """:func:`base_hash` of a target's state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if name != "pos_embed" or not computes_positions:
            digest.update(f"{name}{tuple(state[name].shape)}".encode())
            digest.update(_bytes_of(state[name]))
    return digest.hexdigest()


def base_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The target's part of a state dict, by the names that the target had."""
    names = {name: unwrapped(name).replace(".base_layer.", ".") for name in state}
    return {bare: state[name] for name, bare in names.items() if not _ADDED.search(bare)}


def added_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rest: adapters, and what weak patch sizes have at both ends of the token sequence."""
    names = {name: unwrapped(name) for name in state}
    return {bare: state[name] for name, bare in names.items() if _ADDED.search(bare)}


def unwrapped(name: str) -> str:
    """A tensor's name without what compilation and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def _bytes_of(tensor: Tensor) -> memoryview:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    wide = torch.promote_types(whole.dtype, torch.float32)  # exact, so that a widened copy is the same base
    return memoryview(whole.detach().cpu().to(wide).contiguous().flatten().numpy()).cast("B")  # type: ignore[arg-type]
