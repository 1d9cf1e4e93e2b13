"""Schedules whose quality is measured: at budgets, one line a way to save compute, and mixtures of patch sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from flexidit import flops
from flexidit.patch_size import PatchSize, PatchSizeLike
from flexidit.sampling.schedule import PatchSchedule

Series = Literal["weak first", "weak last", "fewer steps"]
"""The paper's schedule; its counter-example (Fig. 19); the target alone with fewer steps (Fig. 6 right)."""


@dataclass(frozen=True)
class Candidate:
    """A schedule that is measured."""

    schedule: PatchSchedule
    series: str
    """The line of the plot that it belongs to, a :data:`Series` or any other name."""
    budget: float
    """Relative FLOPs that were asked for; what the schedule really costs is measured."""


MIXTURE = "mixture"
"""Series of schedules that were given one by one, such as those that mix several weak patch sizes."""


def candidates(
    model: Any,
    budgets: Iterable[float],
    num_steps: int,
    series: Series = "weak first",
    weak: PatchSizeLike | None = None,
    merged: bool = False,
    size: Sequence[int] | None = None,
) -> list[Candidate]:
    """Schedules nearest to each budget, in the given order.

    Args:
        model: What is priced: a model or its config.
        budgets: FLOPs relative to the base patch size at all ``num_steps``; 1.0 is that itself.
        num_steps: Steps of the full budget; ``"fewer steps"`` takes its share of them.
        series: How compute is saved.
        weak: Patch size of the cheap steps; None: the largest of the model.
        merged: See :attr:`SamplingSettings.merged`.
        size: Latent size of the samples; None: the model's.

    Raises:
        ValueError: a budget that the patch sizes do not reach, or an unknown series.
    """
    base = base_patch_size(model)

    def schedule(budget: float) -> PatchSchedule:
        if series == "fewer steps" or budget == 1.0:
            return PatchSchedule.constant(base, max(1, math.floor(budget * num_steps + 0.5)))
        order = _ORDERS[series]
        return flops.schedule_for_budget(model, budget, num_steps, weak=weak, order=order, size=size, merged=merged)

    if series not in (*_ORDERS, "fewer steps"):
        raise ValueError(f"unknown series {series!r}; give 'weak first', 'weak last' or 'fewer steps'")
    return [Candidate(schedule(budget), series, budget) for budget in budgets]


_ORDERS: dict[str, Literal["weak_first", "weak_last"]] = {"weak first": "weak_first", "weak last": "weak_last"}


def mode_candidates(
    model: Any,
    budgets: Sequence[float],
    num_steps: int,
    series: Series = "weak first",
    weak: Sequence[PatchSizeLike] = (),
    merged: bool = False,
) -> list[Candidate]:
    """:func:`candidates` of several weak patch sizes, a line each: ``"weak first 2x2x2"``, ``"weak first 1x4x4"``.

    A size that does not reach a budget is left out there. With one size, or none given, this is :func:`candidates`.

    Raises:
        ValueError: a budget that no size reaches.
    """
    if len(weak) < 2 or series == "fewer steps":
        return candidates(model, budgets, num_steps, series, weak[0] if len(weak) == 1 else None, merged)
    sizes = [PatchSize.parse(size) for size in weak]
    cheapest = min(sizes, key=lambda size: flops.forward_flops(model, size, merged=merged))
    for budget in budgets:
        if not reaches(model, cheapest, budget, num_steps, merged):
            candidates(model, [budget], num_steps, series, cheapest, merged)  # refuses it
    return [
        replace(candidate, series=f"{series} {size}")
        for size in sizes
        for budget in budgets
        if reaches(model, size, budget, num_steps, merged)
        for candidate in candidates(model, [budget], num_steps, series, size, merged)
    ]


def reaches(model: Any, weak: PatchSizeLike, budget: float, num_steps: int, merged: bool = False) -> bool:
    """Whether steps of this patch size can save so much, to the nearest schedule."""
    lowest = flops.forward_flops(model, weak, merged=merged) / flops.forward_flops(model, base_patch_size(model))
    return budget >= lowest - (1 - lowest) / num_steps / 2


def mixture_candidates(
    model: Any, schedules: Iterable[PatchSchedule], full_steps: int, merged: bool = False
) -> list[Candidate]:
    """Schedules as they are given; their budget is what they cost, in thousandths of ``full_steps`` base steps."""
    full = flops.schedule_cost(model, PatchSchedule.constant(base_patch_size(model), full_steps), merged=merged).total
    costs = [(schedule, flops.schedule_cost(model, schedule, merged=merged).total) for schedule in schedules]
    return [Candidate(schedule, MIXTURE, round(cost / full, 3)) for schedule, cost in costs]


def base_patch_size(model: Any) -> PatchSize:
    """The pre-trained, most powerful size of a model or a config."""
    return next(iter(flops.forward_costs(model)))
