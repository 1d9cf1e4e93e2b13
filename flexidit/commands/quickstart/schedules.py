"""Which schedules the quick start measures: ways to save compute that begin at the same full budget."""

from __future__ import annotations

from typing import Any

from flexidit.commands.quickstart.settings import QuickstartSettings, TextToVideoSettings
from flexidit.flops import schedule_cost
from flexidit.metrics.curve_candidates import MIXTURE, Candidate
from flexidit.sampling.schedule import PatchSchedule

SPATIAL, TEMPORAL = "spatial first", "temporal first"


def image_schedules(model: Any, settings: QuickstartSettings) -> list[Candidate]:
    """Weak first from full budget to all-weak; weak last and fewer steps at some of these costs."""
    first = [_weak_first(settings, settings.weak_patch_size, count) for count in settings.weak_steps]
    return [*_priced(model, settings, "weak first", first), *_compared(model, settings)]


def clip_schedules(model: Any, settings: TextToVideoSettings) -> list[Candidate]:
    """Each weak mode from full budget to all-weak, both within one sample, weak last and fewer steps."""
    modes = {SPATIAL: settings.weak_patch_size, TEMPORAL: settings.temporal_patch_size}
    found: list[Candidate] = []
    for series, weak in modes.items():
        found += _priced(model, settings, series, [_weak_first(settings, weak, n) for n in settings.weak_steps])
    mixed = [PatchSchedule.parse(text) for text in settings.mixtures]
    return [*found, *_priced(model, settings, MIXTURE, mixed), *_compared(model, settings)]


def _compared(model: Any, settings: QuickstartSettings) -> list[Candidate]:
    last = [_weak_first(settings, settings.weak_patch_size, count) for count in settings.compared_weak_steps]
    last = [PatchSchedule(schedule.steps[::-1]) for schedule in last]
    steps = settings.num_sampling_steps
    fewer = [PatchSchedule.constant(settings.patch_size, round(_share(model, settings, s) * steps)) for s in last]
    budgets = [round(_share(model, settings, schedule), 4) for schedule in last]
    return [
        *_priced(model, settings, "weak last", last),
        *(Candidate(schedule, "fewer steps", budget) for schedule, budget in zip(fewer, budgets, strict=True)),
    ]


def _priced(model: Any, settings: QuickstartSettings, series: str, schedules: list[PatchSchedule]) -> list[Candidate]:
    return [Candidate(schedule, series, round(_share(model, settings, schedule), 4)) for schedule in schedules]


def _weak_first(settings: QuickstartSettings, weak: int | str, num_weak: int) -> PatchSchedule:
    powerful, steps = settings.patch_size, settings.num_sampling_steps
    if num_weak in (0, steps):
        return PatchSchedule.constant(weak if num_weak else powerful, steps)
    return PatchSchedule.weak_first(num_steps=steps, weak_steps=num_weak, weak=weak, powerful=powerful)


def _share(model: Any, settings: QuickstartSettings, schedule: PatchSchedule) -> float:
    """Of the FLOPs of the full budget."""
    full = PatchSchedule.constant(settings.patch_size, settings.num_sampling_steps)
    return schedule_cost(model, schedule).total / schedule_cost(model, full).total
