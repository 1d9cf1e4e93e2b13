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
    config = _config_of(model_or_config)
    return _forward(config, PatchSize.parse(patch_size), config.input_size if size is None else size, merged)


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
    return _price(model_or_config, Counter(sizes), size, merged)


def trace_cost(
    model_or_config: ModelOrConfig, trace: Iterable[Call], size: Sequence[int] | None = None, merged: bool = True
) -> ScheduleCost:
    """Cost of what a sampler ran, all samples and any padding of the last batch together."""
    sequences: Counter[PatchSize] = Counter()
    for call in trace:
        sequences[call.patch_size] += call.num_sequences
    return _price(model_or_config, sequences, size, merged)


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
def _forward(config: object, patch_size: PatchSize, size: Sequence[int], merged: bool) -> int:
    """FLOPs of one forward pass; each model family registers its own formula."""
    known = ", ".join(kind.__name__ for kind in _forward.registry if kind is not object)
    raise ValueError(f"no FLOPs formula for {type(config).__name__}; known: {known}, or a model with such a .config")


@_forward.register
def _dit(config: DiTConfig, patch_size: PatchSize, size: Sequence[int], merged: bool) -> int:
    num_tokens, width = patch_size.num_tokens(size), config.hidden_size  # T, D
    mlp_width = int(width * config.mlp_ratio)
    out_channels = config.in_channels * (2 if config.learn_sigma else 1)
    layers = [(width, 3 * width), (width, width), (width, mlp_width), (mlp_width, width)]  # qkv, proj, fc1, fc2
    block = (
        sum(_linear(num_tokens, *layer) for layer in layers)
        + _attention(num_tokens, num_tokens, width)
        + _linear(1, width, 6 * width)  # adaLN: one row per sample
        + sum(_adapter(num_tokens, _adapter_rank(config, patch_size, merged), *layer) for layer in layers)
    )
    return (
        _linear(num_tokens, config.in_channels * patch_size.volume, width)
        + _linear(1, _FREQUENCIES, width)
        + _linear(1, width, width)
        + config.depth * block
        + _linear(1, width, 2 * width)  # adaLN of the final layer
        + _linear(num_tokens, width, out_channels * patch_size.volume)
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
    model_or_config: ModelOrConfig, sequences: Mapping[PatchSize, int], size: Sequence[int] | None, merged: bool
) -> ScheduleCost:
    """Cost of so many sequences at each patch size."""
    costs = {patch_size: forward_flops(model_or_config, patch_size, size, merged) for patch_size in sorted(sequences)}
    powerful = forward_flops(model_or_config, _config_of(model_or_config).patch_size, size, merged)
    by_size = {patch_size: costs[patch_size] * sequences[patch_size] for patch_size in costs}
    return ScheduleCost(by_size, powerful_total=powerful * sum(sequences.values()))
