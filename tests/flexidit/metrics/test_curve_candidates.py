"""Lines of several weak patch sizes, and mixtures named by what they cost."""

from __future__ import annotations

import pytest

from flexidit import flops
from flexidit.metrics.curve_candidates import candidates, mixture_candidates, mode_candidates, reaches
from flexidit.sampling.schedule import PatchSchedule
from flexidit.variants import variant_config

VIDEO = variant_config("VideoDiT-4.9B")
BUDGETS = [1.0, 0.6, 0.36, 0.2]


def test_one_size_is_the_curve_as_it_was() -> None:
    for weak in ("1x4x4", "2x4x4"):
        ours = mode_candidates(VIDEO, BUDGETS[:3], 50, "weak last", [weak])
        assert ours == candidates(VIDEO, BUDGETS[:3], 50, "weak last", weak)


def test_several_sizes_have_a_line_each_as_far_as_they_reach() -> None:
    found = mode_candidates(VIDEO, BUDGETS, 50, weak=["1x4x4", "2x2x2"])
    lines = {name: [c for c in found if c.series == f"weak first {name}"] for name in ("1x4x4", "2x2x2")}
    assert [c.budget for c in lines["1x4x4"]] == BUDGETS and [c.budget for c in lines["2x2x2"]] == BUDGETS[:3]
    assert len(found) == 7
    for name, line in lines.items():
        assert [c.schedule for c in line] == [
            c.schedule for c in candidates(VIDEO, [c.budget for c in line], 50, weak=name)
        ]


def test_what_no_size_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget 0.1 is out of reach; these patch sizes allow 0.137"):
        mode_candidates(VIDEO, [1.0, 0.1], 50, weak=["1x4x4", "2x2x2"])


def test_reach_is_that_of_the_schedules() -> None:
    lowest = flops.forward_flops(VIDEO, "2x2x2") / flops.forward_flops(VIDEO, "1x2x2")
    for budget in (lowest + 0.01, lowest, lowest - 0.02):
        try:
            candidates(VIDEO, [budget], 10, weak="2x2x2")
            possible = True
        except ValueError:
            possible = False
        assert reaches(VIDEO, "2x2x2", budget, 10) == possible


def test_fewer_steps_are_of_no_mode() -> None:
    found = mode_candidates(VIDEO, [1.0, 0.5], 50, "fewer steps", ["1x4x4", "2x2x2"])
    assert [(c.series, str(c.schedule)) for c in found] == [("fewer steps", "1x2x2:50"), ("fewer steps", "1x2x2:25")]


def test_mixtures_say_what_they_cost() -> None:
    schedules = [PatchSchedule.parse(text) for text in ("1x4x4:20,2x2x2:10,1x2x2:20", "1x2x2:50", "1x2x2:25")]
    found = mixture_candidates(VIDEO, schedules, 50)
    assert [c.schedule for c in found] == schedules and {c.series for c in found} == {"mixture"}
    costs = [flops.forward_flops(VIDEO, size) for size in ("1x4x4", "2x2x2", "1x2x2")]
    relative = (20 * costs[0] + 10 * costs[1] + 20 * costs[2]) / (50 * costs[2])
    assert [c.budget for c in found] == [pytest.approx(relative, abs=5e-4), 1.0, 0.5]


def test_budgets_are_met_at_the_size_that_is_sampled() -> None:
    (small,) = candidates(VIDEO, [0.5], 50, weak="1x4x4", size=(8, 24, 44))
    (native,) = candidates(VIDEO, [0.5], 50, weak="1x4x4")
    assert flops.schedule_cost(VIDEO, small.schedule, size=(8, 24, 44)).relative == pytest.approx(0.5, abs=0.01)
    assert small.schedule != native.schedule  # attention counts for less among few tokens
