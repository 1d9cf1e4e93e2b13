import itertools

import pytest

from flexidit.patch_size import PatchSize
from flexidit.sampling.schedule import PatchSchedule, ScheduleStep

WEAK, POWERFUL = PatchSize.parse(4), PatchSize.parse(2)
SIZES = {"weak": 4, "powerful": 2}
COSTS = {POWERFUL: 237.24, WEAK: 58.09}


def relative_cost(schedule: PatchSchedule) -> float:
    spent = sum(COSTS[step.cond] + COSTS[step.guide] for step in schedule)
    return spent / (2 * len(schedule) * COSTS[POWERFUL])


def test_weak_first_is_weak_then_powerful():
    schedule = PatchSchedule.weak_first(num_steps=5, powerful_steps=2, **SIZES)
    assert [step.cond for step in schedule] == [WEAK] * 3 + [POWERFUL] * 2
    assert all(step.guide == step.cond for step in schedule)


def test_steps_are_counted_from_either_side():
    by_powerful = PatchSchedule.weak_first(num_steps=250, powerful_steps=70, **SIZES)
    assert by_powerful == PatchSchedule.weak_first(num_steps=250, weak_steps=180, **SIZES)


def test_weak_last_is_weak_first_reversed():
    counts = {"num_steps": 9, "powerful_steps": 4, "guide_powerful_steps": 2}
    first, last = PatchSchedule.weak_first(**counts, **SIZES), PatchSchedule.weak_last(**counts, **SIZES)
    assert list(last) == list(first)[::-1]


def test_guiding_branch_switches_later_than_the_conditional_one():
    schedule = PatchSchedule.weak_first(num_steps=250, powerful_steps=90, guide_powerful_steps=50, **SIZES)
    assert schedule.stages() == (
        (ScheduleStep(WEAK, WEAK), 160),
        (ScheduleStep(POWERFUL, WEAK), 40),
        (ScheduleStep(POWERFUL, POWERFUL), 50),
    )


@pytest.mark.parametrize("powerful_steps", [0, 50])
def test_one_sided_schedules_are_constant(powerful_steps):
    schedule = PatchSchedule.weak_first(num_steps=50, powerful_steps=powerful_steps, **SIZES)
    assert schedule == PatchSchedule.constant(2 if powerful_steps else 4, 50)


@pytest.mark.parametrize("text", ["1x4x4:120,2x2x2:60,1x2x2:70", "1x2x2:1", "1x4x4:160,1x2x2:90/1x4x4:200,1x2x2:50"])
def test_parse_reads_str_back(text):
    assert str(PatchSchedule.parse(text)) == text


def test_parse_reads_short_sizes_and_spaces():
    assert PatchSchedule.parse(" 4 : 180 , 2:70 ") == PatchSchedule.parse("1x4x4:180,1x2x2:70")


def test_equal_neighbouring_stages_merge():
    assert PatchSchedule.parse("4:1,4:2,2:1") == PatchSchedule.parse("4:3,2:1")


def test_container():
    schedule = PatchSchedule.parse("4:3,2:2")
    assert len(schedule) == len(list(schedule)) == 5
    assert schedule[0] == schedule[2] == ScheduleStep(WEAK, WEAK) and schedule[-1] == ScheduleStep(POWERFUL, POWERFUL)
    assert schedule.sizes == (POWERFUL, WEAK)
    assert {schedule: "usable as a key"}[PatchSchedule.parse("4:3,2:2")]


@pytest.mark.parametrize("order", ["weak_first", "weak_last"])
def test_for_budget_is_nearest_of_all_schedules(order):
    half_step = (1 - COSTS[WEAK] / COSTS[POWERFUL]) / 25 / 2
    build = getattr(PatchSchedule, order)
    candidates = [build(num_steps=25, weak_steps=k, **SIZES) for k in range(26)]
    for budget in (0.245, 0.3, 0.46, 0.6, 0.755, 0.99, 1.0):
        chosen = PatchSchedule.for_budget(budget, num_steps=25, costs=COSTS, order=order, **SIZES)
        assert abs(relative_cost(chosen) - budget) == min(abs(relative_cost(c) - budget) for c in candidates)
        assert relative_cost(chosen) <= budget + half_step


def test_for_budget_finds_the_schedule_again():
    for weak_steps in range(0, 51, 7):
        schedule = PatchSchedule.weak_first(num_steps=50, weak_steps=weak_steps, **SIZES)
        assert PatchSchedule.for_budget(relative_cost(schedule), num_steps=50, costs=COSTS, **SIZES) == schedule


def test_for_budget_takes_the_cheaper_of_two_equally_near():
    schedule = PatchSchedule.for_budget(0.75, num_steps=1, costs={POWERFUL: 2, WEAK: 1}, **SIZES)
    assert schedule == PatchSchedule.constant(4, 1)


@pytest.mark.parametrize("budget", [0.0, 0.2, 1.1, float("nan")])
def test_for_budget_says_what_is_possible(budget):
    with pytest.raises(ValueError, match=r"0\.245 \(all weak\) to 1"):
        PatchSchedule.for_budget(budget, num_steps=250, costs=COSTS, **SIZES)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PatchSchedule(()), "at least one denoising step"),
        (lambda: PatchSchedule.constant(2, 0), "no steps"),
        (lambda: PatchSchedule.parse("4-180"), "is not a schedule"),
        (lambda: PatchSchedule.parse("4:1/4:1/4:1"), "3 branches"),
        (lambda: PatchSchedule.parse("4:2/4:3"), "same number"),
        (lambda: PatchSchedule.parse("4:2/2:2"), "more powerful than the conditional"),
        (lambda: PatchSchedule.weak_first(num_steps=5, **SIZES), "either powerful_steps or weak_steps"),
        (lambda: PatchSchedule.weak_first(num_steps=5, weak_steps=1, powerful_steps=4, **SIZES), "either"),
        (lambda: PatchSchedule.weak_first(num_steps=5, powerful_steps=6, **SIZES), "do not fit into 5"),
        (lambda: PatchSchedule.weak_first(num_steps=5, weak_steps=6, **SIZES), "do not fit into 5"),
        (lambda: PatchSchedule.weak_first(num_steps=0, weak_steps=0, **SIZES), "at least one"),
        (lambda: PatchSchedule.weak_first(num_steps=5, weak_steps=2, weak=2, powerful=4), "must be larger"),
        (lambda: PatchSchedule.for_budget(0.5, num_steps=5, costs={POWERFUL: 1}, **SIZES), "no cost is given"),
        (lambda: PatchSchedule.for_budget(0.5, num_steps=5, costs=COSTS, order="best", **SIZES), "unknown order"),
        (lambda: PatchSchedule.for_budget(1, num_steps=5, costs={POWERFUL: 1, WEAK: 2}, **SIZES), "must cost less"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_guiding_branch_cannot_be_more_powerful():
    with pytest.raises(ValueError, match="never more powerful"):
        PatchSchedule.weak_first(num_steps=5, powerful_steps=2, guide_powerful_steps=3, **SIZES)
    for cond, guide in itertools.product((WEAK, POWERFUL), repeat=2):
        if guide < cond:
            with pytest.raises(ValueError, match="more powerful"):
                ScheduleStep(cond, guide)
        else:
            ScheduleStep(cond, guide)
