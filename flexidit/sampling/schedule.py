"""Which patch size each denoising step uses: data only, no model and no tensor.

A schedule lists the steps in sampling order, from noise to data. The sampler iterates over it and ``flops.py``
sums over it, so the cost that is reported is that of what runs. Early steps decide coarse structure and can be
weak (large patches, few tokens), late ones draw detail and should be powerful (paper, section 3.3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Literal, TypeAlias

from flexidit.patch_size import PatchSize, PatchSizeLike

Stages: TypeAlias = "Sequence[tuple[PatchSizeLike, int]]"
Order: TypeAlias = Literal["weak_first", "weak_last"]

_FORM = "'4:180,2:70' (patch size:steps); a guiding branch that differs follows a slash: '4:160,2:90/4:200,2:50'"


@dataclass(frozen=True)
class ScheduleStep:
    """Patch sizes of one denoising step.

    Attributes:
        cond: size of the conditional prediction.
        guide: size of the guiding prediction (p_uncond in the paper); as large as ``cond`` or larger, since only a
            weaker model can guide (section 3.4). Ignored when sampling without guidance.
    """

    cond: PatchSize
    guide: PatchSize

    def __post_init__(self) -> None:
        if self.guide < self.cond:
            raise ValueError(
                f"the guiding prediction (patch size {self.guide}) is more powerful than the conditional one "
                f"({self.cond}); give the guiding branch the same patch size or a larger one"
            )


@dataclass(frozen=True)
class PatchSchedule:
    """Patch sizes of every denoising step, in sampling order.

    Example:
        >>> schedule = PatchSchedule.weak_first(num_steps=250, powerful_steps=70, weak=4, powerful=2)
        >>> str(schedule), len(schedule)
        ('1x4x4:180,1x2x2:70', 250)
        >>> schedule[179].cond < schedule[180].cond, schedule[180].cond
        (False, PatchSize(t=1, h=2, w=2))
        >>> PatchSchedule.parse("4:180,2:70") == schedule == PatchSchedule.parse(str(schedule))
        True
    """

    steps: tuple[ScheduleStep, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a schedule needs at least one denoising step")

    @classmethod
    def from_stages(cls, stages: Stages, guide: Stages | None = None) -> PatchSchedule:
        """Schedule of any list of ``(patch size, number of steps)``; ``guide=None`` guides at the same sizes.

        Raises:
            ValueError: a stage without steps, a guiding branch of another length or more powerful than the
                conditional one.

        Example:
            >>> print(PatchSchedule.from_stages([(4, 120), ("2x2x2", 60), (2, 70)]))
            1x4x4:120,2x2x2:60,1x2x2:70
        """
        cond_sizes = _expand(stages)
        guide_sizes = cond_sizes if guide is None else _expand(guide)
        if len(cond_sizes) != len(guide_sizes):
            raise ValueError(
                f"the conditional branch has {len(cond_sizes)} steps and the guiding branch {len(guide_sizes)}; "
                "give both the same number"
            )
        return cls(tuple(ScheduleStep(c, g) for c, g in zip(cond_sizes, guide_sizes, strict=True)))

    @classmethod
    def constant(cls, patch_size: PatchSizeLike, num_steps: int) -> PatchSchedule:
        """One patch size throughout.

        Example:
            >>> print(PatchSchedule.constant(2, num_steps=250))
            1x2x2:250
        """
        return cls.from_stages([(patch_size, num_steps)])

    @classmethod
    def weak_first(
        cls,
        *,
        num_steps: int,
        weak: PatchSizeLike,
        powerful: PatchSizeLike,
        powerful_steps: int | None = None,
        weak_steps: int | None = None,
        guide_powerful_steps: int | None = None,
    ) -> PatchSchedule:
        """The paper's schedule: weak steps, then powerful ones (section 3.3).

        Args:
            num_steps: number of denoising steps.
            weak: patch size of the first steps.
            powerful: patch size of the last steps; smaller than ``weak``.
            powerful_steps: number of last steps whose conditional prediction is powerful.
            weak_steps: the same said by its complement; give exactly one of the two.
            guide_powerful_steps: number of last steps whose guiding prediction is powerful, at most
                ``powerful_steps``; ``None``: the same. ``powerful_steps=x, guide_powerful_steps=y`` is the paper's
                "x/y" (READING.md 12).

        Example:
            >>> sizes = dict(num_steps=250, weak=4, powerful=2)
            >>> print(PatchSchedule.weak_first(powerful_steps=90, guide_powerful_steps=50, **sizes))
            1x4x4:160,1x2x2:90/1x4x4:200,1x2x2:50
        """
        cond, guide = _powerful_counts(num_steps, powerful_steps, weak_steps, guide_powerful_steps)
        sizes = _ordered_sizes(weak, powerful)
        return cls.from_stages(_two_stages(num_steps, cond, *sizes), _two_stages(num_steps, guide, *sizes))

    @classmethod
    def weak_last(
        cls,
        *,
        num_steps: int,
        weak: PatchSizeLike,
        powerful: PatchSizeLike,
        powerful_steps: int | None = None,
        weak_steps: int | None = None,
        guide_powerful_steps: int | None = None,
    ) -> PatchSchedule:
        """The paper's counter-example (Fig. 19): :meth:`weak_first` in reverse, at the same cost.

        Example:
            >>> print(PatchSchedule.weak_last(num_steps=50, weak_steps=20, weak=4, powerful=2))
            1x2x2:30,1x4x4:20
        """
        forward = cls.weak_first(
            num_steps=num_steps,
            weak=weak,
            powerful=powerful,
            powerful_steps=powerful_steps,
            weak_steps=weak_steps,
            guide_powerful_steps=guide_powerful_steps,
        )
        return cls(forward.steps[::-1])

    @classmethod
    def parse(cls, text: str) -> PatchSchedule:
        """Read ``"1x4x4:120,2x2x2:60,1x2x2:70"``; inverse of ``str``.

        The guiding branch follows a slash if it differs: ``"4:160,2:90/4:200,2:50"``.

        Raises:
            ValueError: the text has another form, or :meth:`from_stages` refuses it.
        """
        branches = [_parse_stages(part, text) for part in text.split("/")]
        if len(branches) > 2:
            raise ValueError(f"{text!r} has {len(branches)} branches; write a schedule as {_FORM}")
        return cls.from_stages(*branches)

    @classmethod
    def for_budget(
        cls,
        budget: float,
        *,
        num_steps: int,
        costs: Mapping[PatchSize, float],
        weak: PatchSizeLike,
        powerful: PatchSizeLike,
        order: Order = "weak_first",
    ) -> PatchSchedule:
        """Schedule whose cost, relative to powerful steps only, is nearest to ``budget``.

        Both branches switch at the same step. Of two equally near schedules the cheaper is taken, so the cost is
        above the budget by at most half of what one weak step saves: (1 - weak / powerful) / (2 * num_steps).

        Args:
            budget: relative cost, between all-weak and 1.
            num_steps: number of denoising steps.
            costs: cost of one forward pass by patch size, in any unit; ``flops.forward_costs`` gives FLOPs.
            weak: patch size of the cheap steps.
            powerful: patch size of the others.
            order: ``"weak_first"`` or ``"weak_last"``.

        Raises:
            ValueError: the budget is out of reach (the sentence says what is possible), or a cost is missing.

        Example:
            >>> costs = {PatchSize.parse(2): 237.24, PatchSize.parse(4): 58.09}
            >>> print(PatchSchedule.for_budget(0.6, num_steps=250, costs=costs, weak=4, powerful=2))
            1x4x4:132,1x2x2:118
        """
        if order not in ("weak_first", "weak_last"):
            raise ValueError(f"unknown order {order!r}; give 'weak_first' or 'weak_last'")
        weak, powerful = _ordered_sizes(weak, powerful)
        saved = 1 - _cost(costs, weak) / _cost(costs, powerful)
        weak_steps = _steps_for_budget(budget, num_steps, saved)
        build = cls.weak_first if order == "weak_first" else cls.weak_last
        return build(num_steps=num_steps, weak_steps=weak_steps, weak=weak, powerful=powerful)

    @property
    def sizes(self) -> tuple[PatchSize, ...]:
        """Every patch size of either branch, most powerful first.

        Example:
            >>> [size.name for size in PatchSchedule.parse("4:3,2:1").sizes]
            ['1x2x2', '1x4x4']
        """
        return tuple(sorted({size for step in self.steps for size in (step.cond, step.guide)}))

    def stages(self) -> tuple[tuple[ScheduleStep, int], ...]:
        """Runs of equal steps, as ``(step, number of steps)`` in sampling order.

        Example:
            >>> [count for _, count in PatchSchedule.parse("4:160,2:90/4:200,2:50").stages()]
            [160, 40, 50]
        """
        return tuple((step, len(list(run))) for step, run in groupby(self.steps))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[ScheduleStep]:
        return iter(self.steps)

    def __getitem__(self, index: int) -> ScheduleStep:
        return self.steps[index]

    def __str__(self) -> str:
        cond = _format([step.cond for step in self.steps])
        guide = _format([step.guide for step in self.steps])
        return cond if cond == guide else f"{cond}/{guide}"


def _expand(stages: Stages) -> list[PatchSize]:
    for size, count in stages:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"stage {size}:{count} has no steps; give every stage a whole number of at least one")
    return list(chain.from_iterable([PatchSize.parse(size)] * count for size, count in stages))


def _format(sizes: Sequence[PatchSize]) -> str:
    return ",".join(f"{size.name}:{len(list(run))}" for size, run in groupby(sizes))


def _parse_stages(part: str, text: str) -> list[tuple[PatchSizeLike, int]]:
    fields = [re.fullmatch(r"\s*([\dx]+)\s*:\s*(\d+)\s*", field) for field in part.split(",")]
    matches = [match for match in fields if match is not None]
    if len(matches) != len(fields):
        raise ValueError(f"{text!r} is not a schedule; write it as {_FORM}")
    return [(match[1], int(match[2])) for match in matches]


def _two_stages(num_steps: int, powerful_steps: int, weak: PatchSize, powerful: PatchSize) -> Stages:
    stages = [(weak, num_steps - powerful_steps), (powerful, powerful_steps)]
    return [(size, count) for size, count in stages if count]


def _ordered_sizes(weak: PatchSizeLike, powerful: PatchSizeLike) -> tuple[PatchSize, PatchSize]:
    weak, powerful = PatchSize.parse(weak), PatchSize.parse(powerful)
    if not powerful < weak:
        raise ValueError(f"the weak patch size ({weak}) must be larger than the powerful one ({powerful})")
    return weak, powerful


def _powerful_counts(
    num_steps: int, powerful_steps: int | None, weak_steps: int | None, guide_powerful_steps: int | None
) -> tuple[int, int]:
    """Number of powerful steps of the conditional and of the guiding branch."""
    if num_steps < 1:
        raise ValueError(f"a schedule needs at least one denoising step, got num_steps={num_steps}")
    if (powerful_steps is None) == (weak_steps is None):
        raise ValueError("give either powerful_steps or weak_steps")
    cond = powerful_steps if powerful_steps is not None else num_steps - (weak_steps or 0)
    guide = cond if guide_powerful_steps is None else guide_powerful_steps
    if not 0 <= cond <= num_steps:
        raise ValueError(f"{cond} powerful and {num_steps - cond} weak steps do not fit into {num_steps} steps")
    if not 0 <= guide <= cond:
        raise ValueError(
            f"guide_powerful_steps={guide} must lie between 0 and the {cond} powerful steps of the conditional branch: "
            "a guiding prediction is never more powerful than what it guides"
        )
    return cond, guide


def _cost(costs: Mapping[PatchSize, float], size: PatchSize) -> float:
    if size not in costs:
        raise ValueError(f"no cost is given for patch size {size}; known: {', '.join(map(str, sorted(costs)))}")
    return costs[size]


def _steps_for_budget(budget: float, num_steps: int, saved: float) -> int:
    """Number of weak steps, of which each saves ``saved / num_steps``, that is nearest to the budget."""
    if num_steps < 1:
        raise ValueError(f"a schedule needs at least one denoising step, got num_steps={num_steps}")
    if not 0 < saved < 1:
        raise ValueError(f"a weak step must cost less than a powerful one, but its relative cost is {1 - saved:.3f}")
    half_step = saved / num_steps / 2
    if not 1 - saved - half_step <= budget <= 1 + half_step:
        lowest = math.ceil((1 - saved) * 1000) / 1000
        raise ValueError(f"budget {budget:g} is out of reach; these patch sizes allow {lowest:.3f} (all weak) to 1")
    exact = (1 - budget) / saved * num_steps
    return min(max(math.floor(exact + 0.5), 0), num_steps)
