"""A spike is many times the median of the norms before it, of the same patch size."""

from __future__ import annotations

from statistics import median

from lightning_modules.gradient_history import GradientHistory


def test_a_spike_is_told_in_medians_of_those_before() -> None:
    history = GradientHistory(factor=5, window=10)
    norms = [1.0, 1.2, 0.8, 1.1]
    assert [history.add("1x2x2", norm) for norm in norms] == [None] * 4
    assert history.add("1x2x2", 4.9 * median(norms)) is None
    assert history.add("1x2x2", 12.0) == 12.0 / median([*norms, 4.9 * median(norms)])


def test_nothing_is_judged_before_a_fifth_of_the_window_is_known() -> None:
    history = GradientHistory(factor=2, window=50)
    assert [history.add("1x2x2", 10.0**step) for step in range(10)] == [None] * 10
    assert history.add("1x2x2", 1e12) is not None


def test_sizes_do_not_judge_one_another() -> None:
    history = GradientHistory(factor=2, window=5)
    for _ in range(5):
        assert history.add("1x2x2", 1.0) is None
        assert history.add("1x4x4", 100.0) is None


def test_a_new_level_is_usual_after_half_a_window() -> None:
    history = GradientHistory(factor=5, window=10)
    for _ in range(10):
        history.add("1x2x2", 1.0)
    found = [history.add("1x2x2", 10.0) for _ in range(10)]
    assert [ratio is not None for ratio in found] == [True] * 5 + [False] * 5


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    one, other = GradientHistory(window=7), GradientHistory(window=7)
    norms = [1 + step % 3 for step in range(20)] + [50.0, 1.0, 60.0]
    for norm in norms[:9]:
        one.add("1x2x2", norm)
    other.load_state_dict(one.state_dict())
    assert [one.add("1x2x2", norm) for norm in norms[9:]] == [other.add("1x2x2", norm) for norm in norms[9:]]
