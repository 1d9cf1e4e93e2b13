"""What a forward pass and a schedule cost, in closed form.

Conventions of the paper (appendix C.1 and READING.md): one multiply-accumulate is two FLOPs; the theoretical operations
of matrix products and attention in the denoising network, for one sample; no VAE, no text encoder, no element-wise
work. Weights that depend on nothing but the patch size (the shared embedding projected to it, merged adapters) are
computed once and not counted. A model or its config may be given; no torch is needed for a config.

Symbol legend: T tokens, D hidden size, C and O input and output channels, P positions under one patch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import TYPE_CHECKING, Any, TypeAlias

from flexidit.config import DiTConfig
from flexidit.patch_size import PatchSize, PatchSizeLike
from flexidit.sampling.schedule import Order, PatchSchedule
from flexidit.token_layout import BlockWork

if TYPE_CHECKING:
    from flexidit.sampling.sampler import Call

ModelOrConfig: TypeAlias = Any
"""A config with a registered formula, or a model that carries one as ``model.config``."""

_FREQUENCIES = 256
"""Width of the sinusoidal timestep features that enter DiT's timestep MLP."""


@dataclass(frozen=True)
class ScheduleCost:
    """FLOPs of a denoising process.

    Example:
        >>> cost = ScheduleCost({PatchSize.parse(2): 700, PatchSize.parse(4): 300}, powerful_total=2000)
        >>> cost.total, cost.relative
        (1000, 0.5)
    """

    by_size: Mapping[PatchSize, int]
    """FLOPs spent at each patch size."""
    powerful_total: int
    """FLOPs of as many predictions at the base patch size."""

    @property
    def total(self) -> int:
        """FLOPs of all predictions."""
        return sum(self.by_size.values())

    @property
    def relative(self) -> float:
        """``total / powerful_total``: the "compute %" of the paper's figures."""
        return self.total / self.powerful_total


def forward_flops(
    model_or_config: ModelOrConfig,
    patch_size: PatchSizeLike,
    size: Sequence[int] | None = None,
    merged: bool = True,
) -> int:
    """FLOPs of one forward pass of one sample.

    Args:
        model_or_config: what is priced.
        patch_size: any size, also one that the model does not have (yet).
        size: latent size; ``None``: ``config.input_size``.
        merged: whether adapters are merged into the weights, where they cost nothing; unmerged ones add
            2 T rank (in + out) per adapted layer at weak sizes (paper, Fig. 5). Without adapters it does not matter.

    Raises:
        ValueError: no formula is known for this kind of model.

    Example:
        >>> round(forward_flops(DiTConfig(), 2) / 1e9, 2), round(forward_flops(DiTConfig(), 4) / 1e9, 2)
        (237.24, 58.09)
    """
    return batch_flops(model_or_config, patch_size, size=size, merged=merged)


def batch_flops(
    model_or_config: ModelOrConfig,
    patch_size: PatchSizeLike,
    num_sequences: int = 1,
    work: BlockWork | None = None,
    size: Sequence[int] | None = None,
    merged: bool = True,
) -> int:
    """FLOPs of one batch of predictions.

    Args:
        model_or_config: what is priced.
        patch_size: any size, also one that the model does not have (yet).
        num_sequences: N.
        work: what packing made of the batch in the blocks, where padding and masked keys are work like any other;
            ``None``: N sequences, each by itself.
        size: latent size; ``None``: ``config.input_size``.
        merged: as in :func:`forward_flops`.

    Raises:
        ValueError: no formula is known for this kind of model.
    """
    config, patch_size = _config_of(model_or_config), PatchSize.parse(patch_size)
    size = config.input_size if size is None else size
    num_tokens = patch_size.num_tokens(size)
    own_work = BlockWork(num_sequences, num_tokens, num_tokens)
    return _batch(config, patch_size, num_sequences, own_work if work is None else work, size, merged)


def forward_costs(
    model_or_config: ModelOrConfig, size: Sequence[int] | None = None, merged: bool = True
) -> dict[PatchSize, int]:
    """:func:`forward_flops` at each patch size that the model has, base first."""
    sizes = _sizes_of(_config_of(model_or_config))
    return {patch_size: forward_flops(model_or_config, patch_size, size, merged) for patch_size in sizes}


def schedule_cost(
    model_or_config: ModelOrConfig,
    schedule: PatchSchedule,
    guided: bool = True,
    size: Sequence[int] | None = None,
    merged: bool = True,
) -> ScheduleCost:
    """Cost of sampling once under a schedule.

    Args:
        model_or_config: what is priced.
        schedule: patch size of each step's predictions; they need not be sizes that the model has (yet).
        guided: whether each step makes a guiding prediction too; ``sampler.is_guided``, since at scale 1 none is made.
        size: latent size; ``None``: ``config.input_size``.
        merged: as in :func:`forward_flops`.

    Example:
        >>> schedule = PatchSchedule.weak_first(num_steps=250, powerful_steps=70, weak=4, powerful=2)
        >>> round(schedule_cost(DiTConfig(), schedule).relative, 3)
        0.456
    """
    sizes = [step.cond for step in schedule] + [step.guide for step in schedule if guided]
    return _price(model_or_config, [(patch_size, 1, None) for patch_size in sizes], size, merged)


def trace_cost(
    model_or_config: ModelOrConfig, trace: Iterable[Call], size: Sequence[int] | None = None, merged: bool = True
) -> ScheduleCost:
    """Cost of what a sampler ran, all samples and any padding, of the last batch or by packing, together."""
    batches = [(call.patch_size, call.num_sequences, call.work) for call in trace]
    return _price(model_or_config, batches, size, merged)


def schedule_for_budget(
    model_or_config: ModelOrConfig,
    budget: float,
    num_steps: int,
    weak: PatchSizeLike | None = None,
    order: Order = "weak_first",
    size: Sequence[int] | None = None,
    merged: bool = True,
) -> PatchSchedule:
    """Two-stage schedule whose relative cost is nearest to ``budget``; see :meth:`PatchSchedule.for_budget`.

    Args:
        model_or_config: what is priced.
        budget: cost relative to base patches throughout.
        num_steps: number of denoising steps.
        weak: patch size of the cheap steps; ``None``: the largest that the model has.
        order: "weak_first" or "weak_last".
        size: latent size; ``None``: ``config.input_size``.
        merged: as in :func:`forward_flops`.

    Raises:
        ValueError: the budget is out of reach, or the model has one patch size and ``weak`` is not given.
    """
    base, *others = _sizes_of(_config_of(model_or_config))
    if weak is None and not others:
        raise ValueError(f"this model has no patch size but {base}; flexify it, or give weak=...")
    weak = max(others) if weak is None else PatchSize.parse(weak)
    costs = {patch_size: forward_flops(model_or_config, patch_size, size, merged) for patch_size in (base, weak)}
    return PatchSchedule.for_budget(budget, num_steps=num_steps, costs=costs, weak=weak, powerful=base, order=order)


@singledispatch
def _batch(
    config: object, patch_size: PatchSize, num_sequences: int, work: BlockWork, size: Sequence[int], merged: bool
) -> int:
    """FLOPs of one batch of predictions; each model family registers its own formula."""
    known = ", ".join(kind.__name__ for kind in _batch.registry if kind is not object)
    raise ValueError(f"no FLOPs formula for {type(config).__name__}; known: {known}, or a model with such a .config")


@_batch.register
def _dit(
    config: DiTConfig, patch_size: PatchSize, num_sequences: int, work: BlockWork, size: Sequence[int], merged: bool
) -> int:
    num_tokens, width = patch_size.num_tokens(size), config.hidden_size  # T, D
    out_channels = config.in_channels * (2 if config.learn_sigma else 1)
    both_ends = (
        _linear(num_tokens, config.in_channels * patch_size.volume, width)
        + _linear(1, _FREQUENCIES, width)
        + _linear(1, width, width)
        + _linear(1, width, 2 * width)  # adaLN of the final layer
        + _linear(num_tokens, width, out_channels * patch_size.volume)
    )
    rank = _adapter_rank(config, patch_size, merged)
    return num_sequences * both_ends + work.num_sequences * config.depth * _dit_block(config, work, rank)


def _dit_block(config: DiTConfig, work: BlockWork, rank: int) -> int:
    """One block, for one sequence."""
    width, mlp_width = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    layers = [(width, 3 * width), (width, width), (width, mlp_width), (mlp_width, width)]  # qkv, proj, fc1, fc2
    return (
        sum(_linear(work.num_tokens, *layer) + _adapter(work.num_tokens, rank, *layer) for layer in layers)
        + _attention(work.num_tokens, work.num_keys, width)
        + _linear(1, width, 6 * width)  # adaLN: one row per sequence
    )


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(num_queries: int, num_keys: int, width: int) -> int:
    """Scores and weighted sum, over all heads; the softmax is element-wise work."""
    return 2 * 2 * num_queries * num_keys * width


def _adapter(rows: int, rank: int, inputs: int, outputs: int) -> int:
    return _linear(rows, inputs, rank) + _linear(rows, rank, outputs)


def _adapter_rank(config: DiTConfig, patch_size: PatchSize, merged: bool) -> int:
    """Rank of the adapters that run at this size; the base size never has any."""
    if merged or config.flex is None or config.flex.recipe != "lora" or patch_size == config.patch_size:
        return 0
    return config.flex.rank or 0


def _config_of(model_or_config: ModelOrConfig) -> Any:
    return getattr(model_or_config, "config", model_or_config)


def _sizes_of(config: Any) -> tuple[PatchSize, ...]:
    """Base patch size, then the weak ones."""
    return (config.patch_size, *(config.flex.weak_patch_sizes if config.flex else ()))


def _price(
    model_or_config: ModelOrConfig,
    batches: Iterable[tuple[PatchSize, int, BlockWork | None]],
    size: Sequence[int] | None,
    merged: bool,
) -> ScheduleCost:
    """Cost of batches of so many sequences at a patch size, and of what packing made of them."""
    by_size: Counter[PatchSize] = Counter()
    num_predictions = 0
    for (patch_size, num_sequences, work), times in Counter(batches).items():
        by_size[patch_size] += times * batch_flops(model_or_config, patch_size, num_sequences, work, size, merged)
        num_predictions += times * num_sequences
    powerful = forward_flops(model_or_config, _config_of(model_or_config).patch_size, size, merged)
    return ScheduleCost(dict(sorted(by_size.items())), powerful_total=powerful * num_predictions)
