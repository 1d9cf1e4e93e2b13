"""One candidate a budget for one size; a line a size for several; mixtures at the end."""

from callbacks.schedules import mode_of, schedules_of
from flexidit.metrics.curve_candidates import candidates
from flexidit.variants import variant_config

VIDEO = variant_config("VideoDiT-4.9B")


def test_one_size_is_that_of_the_curve() -> None:
    for weak in (4, "2x2x2"):
        assert schedules_of(VIDEO, [1.0, 0.6], 20, weak, ()) == candidates(VIDEO, [1.0, 0.6], 20, weak=weak)
    assert schedules_of(VIDEO, [1.0, 0.6], 20, [4], ()) == candidates(VIDEO, [1.0, 0.6], 20, weak=4)


def test_several_sizes_and_mixtures_are_told_apart() -> None:
    found = schedules_of(VIDEO, [1.0, 0.6], 20, ["1x4x4", "2x2x2"], ["1x4x4:5,2x2x2:5,1x2x2:10"])
    assert [mode_of(c.series, c.budget) for c in found] == ["", "1x4x4", "", "2x2x2", "mixture"]
    assert str(found[-1].schedule) == "1x4x4:5,2x2x2:5,1x2x2:10"
