"""One LoRA adapter per weak patch size, through peft: attach, merge, and the adapter's state (paper, section 3.2).

The only file that imports peft. Which adapter runs is decided in ``layers.adapted_linear`` from the patch size of the
call: peft's ``set_adapter`` is not used, because it also flips ``requires_grad``, which DDP and the optimizer have
read once, at start-up.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from flexidit.patch_size import PatchSize, PatchSizeLike

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer

Model = TypeVar("Model", bound="FlexiTransformer")


def add_adapters(model: FlexiTransformer, patch_sizes: Sequence[PatchSize], *, rank: int, alpha: float) -> None:
    """Attach one trainable adapter per patch size to the family's ``adapted_layers``; these layers are frozen.

    Raises:
        ValueError: a rank below one.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter is at least 1, got {rank}")
    blocks, targets = model.blocks, list(model.adapted_layers)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are what is wanted
        for size in patch_sizes:
            inject_adapter_in_model(config, blocks, adapter_name=size.name)
    for layer in adapted_layers(blocks):
        layer.base_layer.requires_grad_(False)
        for factors in (layer.lora_A, layer.lora_B):
            factors.requires_grad_(True)  # peft leaves only the adapter that it activated last trainable


def adapted_layers(module: nn.Module) -> list[LoraLayer]:
    """All layers that carry adapters."""
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


@torch.no_grad()
def merged_copy(student: Model, patch_size: PatchSizeLike) -> Model:
    """A plain model of one weak size: adapter merged, its (de)embedding in place, its vector in the embedding's bias.

    No additional FLOPs, at the price of a copy of the weights (paper, section 3.2, "Inference without LoRAs").

    Raises:
        ValueError: the student has no adapters, or none for this size.
    """
    size = student.check_patch_size(patch_size)
    flex = student.config.flex
    if flex is None or flex.recipe != "lora" or size == student.base_patch_size:
        raise ValueError(f"patch size {size.name} of this model has no adapter to merge")
    merged = copy.deepcopy(student)
    _merge_layers(merged, size.name)
    embed, own = merged.embedding.per_size[size.name], merged.unembedding.per_size[size.name]
    assert isinstance(embed, nn.Conv2d | nn.Conv3d) and embed.bias is not None and isinstance(own, nn.Linear)
    embed.bias.add_(merged.size_embedder[size.name])
    merged.embedding.proj = embed
    merged.unembedding.weight = nn.Parameter(own.weight)
    merged.unembedding.bias = nn.Parameter(own.bias)
    for layer in (merged.embedding, merged.unembedding):
        layer.per_size, layer.patch_size = nn.ModuleDict(), size
    merged.size_embedder = nn.ParameterDict()
    for weak in flex.weak_patch_sizes:
        merged._buffers.pop(f"pos_embed_{weak.name}", None)
    for name, table in student.plain_tables(size).items():
        setattr(merged, name, nn.Parameter(table.clone(), requires_grad=False))
    merged.config = student.config.plain(size)
    return merged.requires_grad_(False)


def _merge_layers(module: nn.Module, adapter: str) -> None:
    """Replace each adapted layer by its base layer with ``W + alpha / rank * B A``."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge(adapter_names=[adapter])  # type: ignore[operator]
                setattr(parent, name, child.get_base_layer())
