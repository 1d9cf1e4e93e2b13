"""From a pre-trained transformer to a flexible one: recipe "shared" (paper, section 3.1) or "lora" (section 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from flexidit.config import FlexConfig, Positions, Recipe
from flexidit.layers import SizeNorm
from flexidit.models import FlexiTransformer, plain_model
from flexidit.patch_size import PatchSize, PatchSizeLike

Model = TypeVar("Model", bound=FlexiTransformer)


def flexify(
    target: Model,
    patch_sizes: Sequence[PatchSizeLike],
    recipe: Recipe = "shared",
    *,
    underlying_patch_size: PatchSizeLike | None = None,
    size_norms: bool = True,
    positions: Positions = "coords",
    rank: int = 32,
    alpha: float | None = None,
    keep_target: bool = True,
) -> Model:
    """A flexible student of the target's own class, which at the base patch size computes what the target computes.

    Args:
        target: a model with one patch size.
        patch_sizes: the weak sizes to add, each larger than the base size.
        recipe: "shared": one (de)embedding serves all sizes and everything trains; the base size agrees to float
            tolerance before training. "lora": the base is frozen and each weak size gets an adapter, a (de)embedding
            and a patch-size vector of its own; the base size agrees bit for bit, always.
        underlying_patch_size: p' of section 3.1; None takes the largest size along each axis.
        size_norms: give weak sizes their own scale and shift in every layer norm (shared recipe).
        positions: where a weak patch sits: at the coordinates of its centre, of its first base patch ("corners", which
            diffusers' PixArt can express), or at its index.
        rank: rank of the adapters (lora recipe).
        alpha: the adapters' update is scaled by alpha / rank; None takes ``rank``, a factor of one.
        keep_target: False turns the target itself into the student and saves a copy of its weights.

    Raises:
        ValueError: a target that is flexible already, a size that is not weaker than the base, an unknown recipe.
    """
    weak = _check_sizes(target, patch_sizes)
    student = copy.deepcopy(target) if keep_target else target
    student.thaw()
    if recipe == "shared":
        underlying = _underlying_size(student, weak, underlying_patch_size)
        flex = FlexConfig("shared", weak, underlying, size_norms=size_norms, positions=positions)
        _share_weights(student, flex)
    elif recipe == "lora":
        flex = FlexConfig("lora", weak, size_norms=False, positions=positions, rank=rank, alpha=float(alpha or rank))
        _attach_adapters(student, flex)
    else:
        raise ValueError(f"unknown recipe {recipe!r}: give 'shared' or 'lora'")
    student.config = replace(student.config, flex=flex)
    student.reset_derived()
    return student


@torch.no_grad()
def plain_copy(student: Model, patch_size: PatchSizeLike) -> Model:
    """A plain model that computes what the student computes at one patch size, for layouts that hold no more.

    Recipe "shared": the projected weights. Recipe "lora": a weak size with its adapter merged, and at the base size
    the target, bit for bit. The vector of the patch size goes into the embedding's bias.

    Raises:
        ValueError: a size that the student does not have, or a weak one with layer norms of its own.
    """
    size, flex = student.check_patch_size(patch_size), student.config.flex
    if flex is not None and size != student.base_patch_size:
        if flex.recipe == "lora":
            from flexidit.lora import merged_copy

            return merged_copy(student, size)
        if flex.size_norms:
            raise ValueError(
                f"patch size {size.name} of this model has layer norms of its own, which a plain model has no place "
                f"for; take the base size {student.base_patch_size.name}, or flexify with size_norms=False"
            )
    with torch.device("meta"):
        plain = plain_model(student.config.plain(size))
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in student.state_dict().items()}
    state |= _both_ends(student, size)
    plain.load_state_dict({name: state[name].clone() for name in plain.state_dict()}, assign=True)
    return cast(Model, plain.requires_grad_(False).train(student.training))


def added_parameters(student: FlexiTransformer) -> tuple[int, float]:
    """How many parameters the student has beyond its target, and their share of the target's (READING.md, gap 5)."""
    total = sum(p.numel() for p in student.parameters())
    with torch.device("meta"):
        target = sum(p.numel() for p in plain_model(student.config).parameters())
    return total - target, (total - target) / target


def trainable_parameters(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and tensor of each parameter that trains."""
    return ((name, p) for name, p in student.named_parameters() if p.requires_grad)


def _check_sizes(target: FlexiTransformer, patch_sizes: Sequence[PatchSizeLike]) -> tuple[PatchSize, ...]:
    if target.config.flex is not None:
        raise ValueError("this model is flexible already; flexify its target with all the weak sizes at once")
    weak = check_weaker(target, patch_sizes)
    if not weak:
        raise ValueError("no weak patch size was given; give at least one, such as patch_sizes=[4]")
    return weak


def check_weaker(target: FlexiTransformer, patch_sizes: Sequence[PatchSizeLike]) -> tuple[PatchSize, ...]:
    """The sizes, most powerful first.

    Raises:
        ValueError: one that is not larger than the base size, or spans frames that the model does not have.
    """
    weak = tuple(sorted({PatchSize.parse(size) for size in patch_sizes}))
    base = target.base_patch_size
    for size in weak:
        grows = all(side >= base_side for side, base_side in zip(size.as_tuple(), base.as_tuple(), strict=True))
        if not grows or size == base:
            raise ValueError(f"patch size {size.name} is not larger than the pre-trained {base.name}; give larger ones")
        if size.t > 1 and not target.config.is_video:
            raise ValueError(f"patch size {size.name} spans {size.t} frames, but this model takes images; use 1x..x..")
    return weak


def _underlying_size(student: FlexiTransformer, weak: Sequence[PatchSize], given: PatchSizeLike | None) -> PatchSize:
    if given is None:
        return PatchSize(*(max(sides) for sides in zip(*(size.as_tuple() for size in weak), strict=True)))
    underlying, base = PatchSize.parse(given), student.base_patch_size
    if any(side < base_side for side, base_side in zip(underlying.as_tuple(), base.as_tuple(), strict=True)):
        raise ValueError(
            f"underlying patch size {underlying.name} is smaller than the pre-trained {base.name} and would lose it"
        )
    return underlying


def _share_weights(student: FlexiTransformer, flex: FlexConfig) -> None:
    sizes = (student.base_patch_size, *flex.weak_patch_sizes)
    assert flex.underlying_patch_size is not None
    student.embedding.share(flex.underlying_patch_size, sizes)
    student.unembedding.share(flex.underlying_patch_size, sizes)
    _add_size_vector(student, student.base_patch_size)
    add_shared_sizes(student, flex.weak_patch_sizes, flex.size_norms)


def add_shared_sizes(student: FlexiTransformer, patch_sizes: Sequence[PatchSize], size_norms: bool) -> None:
    """What a weak size has of its own in recipe "shared"."""
    for size in patch_sizes:  # zero at first, so that every size starts from the target's own activations
        _add_size_vector(student, size)
    if size_norms:
        norms = [module for module in student.modules() if isinstance(module, SizeNorm)]
        for norm in norms:
            for size in patch_sizes:
                norm.add_size(size, like=next(student.parameters()))


def _attach_adapters(student: FlexiTransformer, flex: FlexConfig) -> None:
    student.requires_grad_(False)
    add_adapted_sizes(student, flex.weak_patch_sizes, flex)


def add_adapted_sizes(student: FlexiTransformer, patch_sizes: Sequence[PatchSize], flex: FlexConfig) -> None:
    """What a weak size has of its own in recipe "lora"."""
    from flexidit.lora import add_adapters

    assert flex.rank is not None and flex.alpha is not None
    add_adapters(student, patch_sizes, rank=flex.rank, alpha=flex.alpha)
    for size in patch_sizes:
        student.embedding.add_size(size)
        student.unembedding.add_size(size)
        _add_size_vector(student, size)


def _both_ends(student: FlexiTransformer, size: PatchSize) -> dict[str, Tensor]:
    """What a plain model of this size has at both ends of the token sequence, by its names in the state dict."""
    weight, bias = student.embedding.weights(size)
    assert bias is not None  # of both families
    if size.name in student.size_embedder:
        bias = bias + student.size_embedder[size.name]
    own_weight, own_bias = student.unembedding.weights(size)
    embedding, unembedding = student.config.embedding_name, student.config.unembedding_name
    return {
        f"{embedding}.proj.weight": weight if student.config.is_video else weight.squeeze(2),
        f"{embedding}.proj.bias": bias,
        f"{unembedding}.weight": own_weight,
        f"{unembedding}.bias": own_bias,
        **student.plain_tables(size),
    }


def _add_size_vector(student: FlexiTransformer, size: PatchSize) -> None:
    student.size_embedder[size.name] = nn.Parameter(next(student.parameters()).new_zeros(student.config.hidden_size))
