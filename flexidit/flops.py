"""What a forward pass and a schedule cost, in closed form.

Conventions of the paper (appendix C.1 and READING.md): one multiply-accumulate is two FLOPs; the theoretical operations
of matrix products and attention in the denoising network, for one sample; no VAE, no text encoder, no element-wise
work. Weights that depend on nothing but the patch size (the shared embedding projected to it, merged adapters) are
computed once and not counted. A model or its config may be given; no torch is needed for a config.

Captions are projected, and become keys and values of cross-attention, in the same way at every step. The paper counts
that work at every step (``captions="every_step"``, the default: budgets and percentages are then the paper's); a
sampler does it once for a run (``captions="once"``).

Symbol legend: T tokens, L caption tokens, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from flexidit.config import CaptionedConfig, DiTConfig, TextDiTConfig, TransformerConfig, WanConfig
from flexidit.patch_size import PatchSize, PatchSizeLike
from flexidit.sampling.schedule import Order, PatchSchedule
from flexidit.token_layout import BlockWork

if TYPE_CHECKING:
    from flexidit.sampling.sampler import Call

ModelOrConfig: TypeAlias = Any
"""A config with a registered formula, or a model that carries one as ``model.config``."""

CaptionWork: TypeAlias = Literal["every_step", "once"]
"""Where the work on captions that no step changes is counted: in every forward pass, or once for each caption."""

_FREQUENCIES = 256
"""Width of the sinusoidal features that enter the MLPs of timesteps and of image sizes."""


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
    """FLOPs of as many predictions at the base patch size, of the same captions."""
    captions: int = 0
    """FLOPs of captions where they are counted once; otherwise they are in ``by_size``."""

    @property
    def total(self) -> int:
        """FLOPs of all predictions, and of their captions."""
        return sum(self.by_size.values()) + self.captions

    @property
    def relative(self) -> float:
        """``total / powerful_total``: the "compute %" of the paper's figures."""
        return self.total / self.powerful_total


def forward_flops(
    model_or_config: ModelOrConfig,
    patch_size: PatchSizeLike,
    size: Sequence[int] | None = None,
    merged: bool = True,
    captions: CaptionWork = "every_step",
) -> int:
    """FLOPs of one forward pass of one sample.

    Args:
        model_or_config: what is priced.
        patch_size: any size, also one that the model does not have (yet).
        size: latent size; ``None``: ``config.input_size``.
        merged: whether adapters are merged into the weights, where they cost nothing; unmerged ones add
            2 T rank (in + out) per adapted layer at weak sizes (paper, Fig. 5). Without adapters it does not matter.
        captions: "every_step" counts the work on the caption, of ``config.caption_length`` tokens; "once" leaves it
            out: see :func:`caption_flops`. Models of labels have none.

    Raises:
        ValueError: no formula is known for this kind of model.

    Example:
        >>> round(forward_flops(DiTConfig(), 2) / 1e9, 2), round(forward_flops(DiTConfig(), 4) / 1e9, 2)
        (237.24, 58.09)
        >>> round(forward_flops(TextDiTConfig(), 2) / 1e9, 2), round(forward_flops(TextDiTConfig(), 4) / 1e9, 2)
        (298.11, 87.44)
    """
    return batch_flops(model_or_config, patch_size, size=size, merged=merged, captions=captions)


def batch_flops(
    model_or_config: ModelOrConfig,
    patch_size: PatchSizeLike,
    num_sequences: int = 1,
    work: BlockWork | None = None,
    size: Sequence[int] | None = None,
    merged: bool = True,
    captions: CaptionWork = "every_step",
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
        captions: as in :func:`forward_flops`.

    Raises:
        ValueError: no formula is known for this kind of model.
    """
    config, patch_size = _config_of(model_or_config), PatchSize.parse(patch_size)
    size = _known_size(config, size)
    _check_caption_work(captions)
    num_tokens = patch_size.num_tokens(size)
    work = BlockWork(num_sequences, num_tokens, num_tokens) if work is None else work
    ends = num_sequences * _ends(config, num_tokens, patch_size)
    block = _transformer_block(config, work, _adapter_rank(config, patch_size, merged)) + _block(config, work)
    blocks = work.num_sequences * config.depth * block
    if captions == "once":
        return ends + blocks
    return ends + blocks + num_sequences * _caption_ends(config) + work.num_sequences * _caption_blocks(config)


def caption_flops(model_or_config: ModelOrConfig) -> int:
    """FLOPs of what a caption costs whatever the patch size and the step: its projection, keys and values.

    Example:
        >>> round(caption_flops(TextDiTConfig()) / 1e9, 2), caption_flops(DiTConfig())
        (19.29, 0)
    """
    config = _config_of(model_or_config)
    return _caption_ends(config) + _caption_blocks(config)


def forward_costs(
    model_or_config: ModelOrConfig,
    size: Sequence[int] | None = None,
    merged: bool = True,
    captions: CaptionWork = "every_step",
) -> dict[PatchSize, int]:
    """:func:`forward_flops` at each patch size that the model has, base first."""
    config = _config_of(model_or_config)
    _known_size(config, size)
    return {one: forward_flops(config, one, size, merged, captions) for one in config.patch_sizes}


def schedule_cost(
    model_or_config: ModelOrConfig,
    schedule: PatchSchedule,
    guided: bool = True,
    size: Sequence[int] | None = None,
    merged: bool = True,
    captions: CaptionWork = "every_step",
) -> ScheduleCost:
    """Cost of sampling once under a schedule.

    Args:
        model_or_config: what is priced.
        schedule: patch size of each step's predictions; they need not be sizes that the model has (yet).
        guided: whether each step makes a guiding prediction too; ``sampler.is_guided``, since at scale 1 none is made.
        size: latent size; ``None``: ``config.input_size``.
        merged: as in :func:`forward_flops`.
        captions: "every_step" as in the paper; "once" for the sample's own caption and, if any step makes an
            unconditional prediction, for the null caption.

    Example:
        >>> schedule = PatchSchedule.weak_first(num_steps=250, powerful_steps=70, weak=4, powerful=2)
        >>> round(schedule_cost(DiTConfig(), schedule).relative, 3)
        0.456
    """
    _check_caption_work(captions)
    sizes = [step.cond for step in schedule] + [step.guide for step in schedule if guided]
    has_null = guided and any(step.cond == step.guide for step in schedule)
    prepared = None if captions == "every_step" else 0
    batches = [_Predictions(patch_size, 1, None, prepared) for patch_size in sizes]
    if prepared is not None:
        batches[0] = replace(batches[0], num_prepared=1 + has_null)
    return _price(model_or_config, batches, size, merged)


def trace_cost(
    model_or_config: ModelOrConfig,
    trace: Iterable[Call],
    size: Sequence[int] | None = None,
    merged: bool = True,
    captions: CaptionWork = "every_step",
) -> ScheduleCost:
    """Cost of what a sampler ran, all samples and any padding, of the last batch or by packing, together.

    Args:
        model_or_config: what is priced.
        trace: of a sampler.
        size: latent size; ``None``: ``config.input_size``.
        merged: as in :func:`forward_flops`.
        captions: "every_step" as in the paper, whatever the sampler did; "once" where the sampler did it once, which
            is what ran.
    """
    _check_caption_work(captions)
    is_paper = captions == "every_step"
    batches = [_Predictions(c.patch_size, c.num_sequences, c.work, None if is_paper else c.num_prepared) for c in trace]
    return _price(model_or_config, batches, size, merged)


def schedule_for_budget(
    model_or_config: ModelOrConfig,
    budget: float,
    num_steps: int,
    weak: PatchSizeLike | None = None,
    order: Order = "weak_first",
    size: Sequence[int] | None = None,
    merged: bool = True,
    captions: CaptionWork = "every_step",
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
        captions: as in :func:`schedule_cost`. Counted once, captions are a share of every budget, and a weak step
            saves more of it.

    Raises:
        ValueError: the budget is out of reach, or the model has one patch size and ``weak`` is not given.
    """
    config = _config_of(model_or_config)
    _known_size(config, size)
    base, *others = config.patch_sizes
    if weak is None and not others:
        raise ValueError(f"this model has no patch size but {base}; flexify it, or give weak=...")
    weak = max(others) if weak is None else PatchSize.parse(weak)
    share = caption_flops(config) / num_steps if captions == "once" else 0  # each branch makes one prediction a step
    costs = {one: forward_flops(config, one, size, merged, captions) + share for one in (base, weak)}
    return PatchSchedule.for_budget(budget, num_steps=num_steps, costs=costs, weak=weak, powerful=base, order=order)


@singledispatch
def _ends(config: object, num_tokens: int, patch_size: PatchSize) -> int:
    """Everything but blocks and captions, for one sequence; each model family registers its own formula."""
    known = ", ".join(kind.__name__ for kind in _ends.registry if kind is not object)
    raise ValueError(f"no FLOPs formula for {type(config).__name__}; known: {known}, or a model with such a .config")


@singledispatch
def _block(config: object, work: BlockWork) -> int:
    """What a block of the family has beside :func:`_transformer_block`, for one sequence, without captions."""
    raise AssertionError(f"{type(config).__name__} has registered no block")


@_ends.register
def _dit_ends(config: DiTConfig, num_tokens: int, patch_size: PatchSize) -> int:
    width = config.hidden_size
    final_modulation = _linear(1, width, 2 * width)
    return _tokens_in_and_out(config, num_tokens, patch_size) + _embedded(1, width) + final_modulation


@_block.register
def _dit_block(config: DiTConfig, work: BlockWork) -> int:
    return _linear(1, config.hidden_size, 6 * config.hidden_size)  # adaLN: one row per sequence


@_ends.register(WanConfig)
@_ends.register(TextDiTConfig)
def _captioned_ends(config: TextDiTConfig | WanConfig, num_tokens: int, patch_size: PatchSize) -> int:
    width = config.hidden_size
    time = _embedded(1, width) + _linear(1, width, 6 * width)  # modulation: once for all blocks
    if isinstance(config, TextDiTConfig) and config.micro_conditions:
        time += _embedded(3, width // 3)  # height, width and their ratio
    return _tokens_in_and_out(config, num_tokens, patch_size) + time


@_block.register
def _captioned_block(config: CaptionedConfig, work: BlockWork) -> int:
    """Cross-attention: queries, scores, output."""
    width = config.hidden_size
    return 2 * _linear(work.num_tokens, width, width) + _attention(work.num_tokens, config.caption_length, width)


def _caption_ends(config: object) -> int:
    """Projection of a caption to the model's width."""
    if not isinstance(config, CaptionedConfig):
        return 0
    length, width = config.caption_length, config.hidden_size
    return _linear(length, config.caption_channels, width) + _linear(length, width, width)


def _caption_blocks(config: object) -> int:
    """Keys and values of a caption in all blocks."""
    if not isinstance(config, CaptionedConfig):
        return 0
    return config.depth * _linear(config.caption_length, config.hidden_size, 2 * config.hidden_size)


def _tokens_in_and_out(config: TransformerConfig, num_tokens: int, patch_size: PatchSize) -> int:
    """Embedding and de-embedding."""
    width, volume = config.hidden_size, patch_size.volume
    return _linear(num_tokens, config.in_channels * volume, width) + _linear(
        num_tokens, width, config.out_channels * volume
    )


def _embedded(count: int, width: int) -> int:
    """The MLP over sinusoidal features of so many numbers."""
    return _linear(count, _FREQUENCIES, width) + _linear(count, width, width)


def _transformer_block(config: TransformerConfig, work: BlockWork, rank: int) -> int:
    """Self-attention and MLP, for one sequence; the layers that adapters of this rank are attached to."""
    rows, layers = work.num_tokens, _adapted_layers(config)
    linear = sum(_linear(rows, *layer) + _adapter(rows, rank, *layer) for layer in layers)
    return linear + _attention(work.num_tokens, work.num_keys, config.hidden_size)


def _adapted_layers(config: TransformerConfig) -> list[tuple[int, int]]:
    """Widths in and out of the linear layers of self-attention and perceptron."""
    width, mlp_width = config.hidden_size, config.mlp_width
    if isinstance(config, WanConfig):
        return [(width, width)] * 4 + [(width, mlp_width), (mlp_width, width)]  # q, k, v, o, ffn.0, ffn.2
    gates = mlp_width if isinstance(config, TextDiTConfig) and config.mlp == "swiglu" else 0
    return [(width, 3 * width), (width, width), (width, mlp_width + gates), (mlp_width, width)]  # qkv, proj, fc1, fc2


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(num_queries: int, num_keys: int, width: int) -> int:
    """Scores and weighted sum, over all heads; the softmax is element-wise work."""
    return 2 * 2 * num_queries * num_keys * width


def _adapter(rows: int, rank: int, inputs: int, outputs: int) -> int:
    return _linear(rows, inputs, rank) + _linear(rows, rank, outputs)


def _adapter_rank(config: TransformerConfig, patch_size: PatchSize, merged: bool) -> int:
    """Rank of the adapters that run at this size; the base size never has any."""
    if merged or config.flex is None or config.flex.recipe != "lora" or patch_size == config.patch_size:
        return 0
    return config.flex.rank or 0


def _config_of(model_or_config: ModelOrConfig) -> Any:
    return getattr(model_or_config, "config", model_or_config)


def _known_size(config: Any, size: Sequence[int] | None) -> Sequence[int]:
    """The latent size, of a config that a formula is known for."""
    if not isinstance(config, TransformerConfig):
        _ends(config, 0, PatchSize(1, 1, 1))  # raises
    return config.input_size if size is None else size


def _check_caption_work(captions: str) -> None:
    if captions not in get_args(CaptionWork):
        raise ValueError(f"captions={captions!r} is not known: give {' or '.join(map(repr, get_args(CaptionWork)))}")


@dataclass(frozen=True)
class _Predictions:
    """A batch at one patch size."""

    patch_size: PatchSize
    num_sequences: int
    work: BlockWork | None
    num_prepared: int | None
    """Captions worked through for this batch and those that follow; None: its own, by itself."""


def _price(
    model_or_config: ModelOrConfig, batches: Iterable[_Predictions], size: Sequence[int] | None, merged: bool
) -> ScheduleCost:
    """Cost of batches, each in its own patch size and packing."""
    config = _config_of(model_or_config)
    by_size: Counter[PatchSize] = Counter()
    powerful, num_prepared = 0, 0
    for batch, times in Counter(batches).items():
        captions: CaptionWork = "every_step" if batch.num_prepared is None else "once"
        flops = batch_flops(config, batch.patch_size, batch.num_sequences, batch.work, size, merged, captions)
        by_size[batch.patch_size] += times * flops
        powerful += times * batch.num_sequences * forward_flops(config, config.patch_size, size, merged, captions)
        num_prepared += times * (batch.num_prepared or 0)
    prepared = num_prepared * caption_flops(config)
    return ScheduleCost(dict(sorted(by_size.items())), powerful + prepared, prepared)
