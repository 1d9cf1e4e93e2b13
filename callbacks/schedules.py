"""Which schedules a callback samples under: budgets for each weak patch size, and schedules as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexidit.metrics.curve_candidates import MIXTURE, Candidate, mixture_candidates, mode_candidates
from flexidit.sampling.schedule import PatchSchedule


def schedules_of(
    model: Any,
    budgets: Sequence[float],
    num_steps: int,
    weak: int | str | Sequence[int | str] | None,
    schedules: Sequence[str],
) -> list[Candidate]:
    """One candidate for each budget of each weak patch size that reaches it, then the given schedules.

    Args:
        model: what is priced.
        budgets: FLOPs relative to the base patch size at all steps.
        num_steps: denoising steps of the full budget.
        weak: patch size of the cheap steps, or several; None: the largest of the model.
        schedules: such as ``"1x4x4:12,2x2x2:6,1x2x2:6"``.
    """
    sizes = [] if weak is None else [weak] if isinstance(weak, int | str) else list(weak)
    found = mode_candidates(model, budgets, num_steps, weak=sizes)
    return found + mixture_candidates(model, [PatchSchedule.parse(text) for text in schedules], num_steps)


def mode_of(candidate_series: str, budget: float) -> str:
    """What tells a schedule from others of its budget: a patch size, "mixture", or nothing.

    Example:
        >>> mode_of("weak first", 0.6), mode_of("weak first 2x2x2", 0.6), mode_of("weak first 2x2x2", 1.0)
        ('', '2x2x2', '')
    """
    if candidate_series == MIXTURE:
        return MIXTURE
    return "" if budget == 1.0 else candidate_series.removeprefix("weak first").strip()
