"""Ranges given or read off a schedule; they hold every timestep at which a solver calls the size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from flexidit.diffusion.flow import RectifiedFlow, shifted
from flexidit.patch_size import PatchSize
from flexidit.sampling.schedule import PatchSchedule
from flexidit.sampling.solvers import make_solver
from lightning_modules.timestep_ranges import parse_ranges, ranges_of

FOUR, EIGHT = PatchSize.parse(4), PatchSize.parse(8)


def test_ranges_are_what_was_given() -> None:
    assert parse_ranges({"4": (400, 1000), "1x8x8": (0, 1)}, [FOUR, EIGHT], 1000) == {
        FOUR: range(400, 1000),
        EIGHT: range(1),
    }
    assert parse_ranges(None, [FOUR], 1000) == {}


@pytest.mark.parametrize("text", ["4:60,2:40", "4:13,2:7", "2:30,4:20", "8:10,4:5,2:5", "4:160,2:90/4:200,2:50"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++", "sa"])
def test_a_schedule_s_ranges_hold_its_timesteps_and_hardly_more(text: str, solver: str) -> None:
    schedule = PatchSchedule.parse(text)
    weak = [size for size in schedule.sizes if size > PatchSize.parse(2)]
    made = make_solver(solver, len(schedule))
    for size, covered in ranges_of(schedule, weak, 1000).items():
        uses = (size in (step.cond, step.guide) for step in schedule)
        times = [int(t) for t, is_own in zip(made.timesteps, uses, strict=True) if is_own]
        assert all(t in covered for t in times)
        spacing = 1000 / len(schedule)
        assert covered.start > min(times) - 2 * spacing
        assert covered.stop < max(times) + 2 * spacing + 1


@pytest.mark.parametrize("text", ["4:60,2:40", "4:13,2:7", "2:30,4:20", "8:10,4:5,2:5", "4:160,2:90/4:200,2:50"])
@pytest.mark.parametrize("solver", ["unipc", "euler", "dpm++"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_a_schedule_s_ranges_hold_the_levels_of_a_flow_and_hardly_more(text: str, solver: str, shift: float) -> None:
    """Compared as levels: those of the solver, and those of training at the ends of each range."""
    schedule = PatchSchedule.parse(text)
    weak = [size for size in schedule.sizes if size > PatchSize.parse(2)]
    made = make_solver(solver, len(schedule), process="flow", time_shift=shift)
    trained = RectifiedFlow(shift=shift).sigmas
    for size, covered in ranges_of(schedule, weak, 1000).items():
        uses = [size in (step.cond, step.guide) for step in schedule]
        levels = [sigma.item() for sigma, is_own in zip(made.sigmas, uses, strict=False) if is_own]
        assert all(trained[covered.start] <= level <= trained[covered.stop - 1] + 1e-6 for level in levels)
        spacing = 1000 / len(schedule)
        ends = (1000 * shifted(level, 1 / shift) - 1 for level in (min(levels), max(levels)))  # as indices
        assert covered.start > next(ends) - 2 * spacing
        assert covered.stop < next(ends) + 2 * spacing + 1


@pytest.mark.parametrize(
    "given, complaint",
    [
        ({"2": (0, 500)}, "name weak patch sizes that train: 1x4x4, 1x8x8"),
        ({}, "name no patch size"),
        ({"4": (500, 500)}, "the steps from 500 and below 500"),
        ({"4": (0, 1001)}, "two numbers of 0 to 1000"),
        ("4:60,2:40", r"does not use 1x8x8"),
        ("4-60", "is not a schedule"),
    ],
)
def test_impossible_ranges_are_refused(given: Mapping[str, Sequence[int]] | str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_ranges(given, [FOUR, EIGHT], 1000)
