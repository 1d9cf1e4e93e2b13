import pytest
import torch

from flexidit.conditions import Captions, Condition, join
from flexidit.patch_size import PatchSize
from flexidit.sampling.guidance import (
    BranchConditions,
    check_negative,
    combine,
    coupled_weak_scale,
    predict_pair,
    scale_of,
)
from flexidit.sampling.schedule import ScheduleStep

WEAK, POWERFUL = PatchSize.parse(4), PatchSize.parse(2)


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    cond, guiding = torch.randn(2, 3, 8, 4, 4, generator=generator, dtype=torch.float64)
    return cond, guiding


class Recorder:
    """Answers with the mean condition of each row, so that one sees which branch a row belongs to."""

    def __init__(self) -> None:
        self.calls: list[tuple[PatchSize, str, list[int]]] = []

    def __call__(self, x, t, y, *, patch_size, branch):
        self.calls.append((patch_size, branch, y.tolist()))
        return y.view(-1, 1, 1, 1) * torch.ones_like(x)


def run_pair(step: ScheduleStep) -> tuple[Recorder, torch.Tensor, torch.Tensor]:
    recorder = Recorder()
    x, t, y = torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.tensor([3, 5])
    told = BranchConditions.of(y, torch.tensor([10, 10]), lambda y: y)
    cond, guiding = predict_pair(recorder, x, t, told, step)
    return recorder, cond, guiding


def test_equal_sizes_share_one_call_and_guide_by_the_null_condition():
    recorder, cond, guiding = run_pair(ScheduleStep(POWERFUL, POWERFUL))
    assert recorder.calls == [(POWERFUL, "cond+uncond", [3, 5, 10, 10])]
    assert cond[:, 0, 0, 0].tolist() == [3, 5] and guiding[:, 0, 0, 0].tolist() == [10, 10]


def test_a_weaker_size_guides_with_its_conditional_prediction():
    recorder, cond, guiding = run_pair(ScheduleStep(POWERFUL, WEAK))
    assert recorder.calls == [(POWERFUL, "cond", [3, 5]), (WEAK, "weak", [3, 5])]
    assert torch.equal(cond, guiding)


def test_scales_are_coupled_by_the_rule_of_the_paper():
    for cfg_scale in (1.5, 4.0, 0.5):
        assert (1 - cfg_scale) / (1 - coupled_weak_scale(cfg_scale)) == pytest.approx(2.5)
    assert scale_of(ScheduleStep(WEAK, WEAK), 4.0, 2.2) == 4.0
    assert scale_of(ScheduleStep(POWERFUL, WEAK), 4.0, 2.2) == 2.2


def test_combine_extrapolates_from_the_guiding_prediction(predictions):
    cond, guiding = predictions
    torch.testing.assert_close(combine(cond, guiding, 4.0, in_channels=8), 4 * cond - 3 * guiding)
    torch.testing.assert_close(combine(cond, guiding, 1.0, in_channels=8), cond)
    torch.testing.assert_close(combine(cond, guiding, 0.0, in_channels=8), guiding)
    torch.testing.assert_close(combine(cond, cond, 7.0, in_channels=8), cond)


@pytest.mark.parametrize(("guidance_channels", "guided"), [(None, 4), (3, 3), (1, 1)])
def test_other_channels_and_the_variance_stay_conditional(predictions, guidance_channels, guided):
    cond, guiding = predictions
    out = combine(cond, guiding, 4.0, in_channels=4, guidance_channels=guidance_channels)
    assert torch.equal(out[:, guided:], cond[:, guided:])
    torch.testing.assert_close(out[:, :guided], (4 * cond - 3 * guiding)[:, :guided])


def test_three_channels_reproduce_official_dit(predictions):
    """Official DiT splits after three channels, guides those and keeps the rest of the conditional half."""
    cond, guiding = predictions
    official = torch.cat([guiding[:, :3] + 4.0 * (cond[:, :3] - guiding[:, :3]), cond[:, 3:]], dim=1)
    assert torch.equal(combine(cond, guiding, 4.0, in_channels=4, guidance_channels=3), official)


def test_combine_leaves_its_inputs_alone(predictions):
    cond, guiding = predictions
    before = cond.clone(), guiding.clone()
    combine(cond, guiding, 4.0, in_channels=4).zero_()
    assert torch.equal(cond, before[0]) and torch.equal(guiding, before[1])


def captions(count: int, num_tokens: int = 3, width: int = 4) -> Captions:
    return Captions(torch.randn(count, num_tokens, width), torch.ones(count, num_tokens, dtype=torch.bool))


def test_both_branches_are_prepared_in_one_go_and_the_conditional_one_is_a_view():
    y, null_y, calls = captions(2), captions(2, num_tokens=5), []

    def prepare(given: Captions) -> Captions:
        calls.append(len(given))
        return Captions(2 * given.embeddings, given.mask)

    told = BranchConditions.of(y, null_y, prepare)
    assert calls == [4] and told.num_prepared == 4
    assert isinstance(told.cond, Captions) and isinstance(told.both, Captions)
    assert torch.equal(told.cond.embeddings[:, :3], 2 * y.embeddings)
    assert told.cond.embeddings.data_ptr() == told.both.embeddings.data_ptr()
    unguided = BranchConditions.of(y, None, prepare)
    assert calls == [4, 2] and unguided.both is None and unguided.num_prepared == 2


def test_what_is_prepared_belongs_to_the_first_call_of_a_run():
    told = BranchConditions(captions(2), num_prepared=4)
    assert [told.prepared_for(*call) for call in ((0, "cond"), (0, "weak"), (1, "cond+uncond"))] == [4, 0, 0]
    assert BranchConditions.of(captions(2), None, lambda y: y).prepared_for(0, "cond") is None


@pytest.mark.parametrize(
    ("y", "negative", "sentence"),
    [
        (torch.tensor([1, 2]), captions(2), "got 2 labels and 2 negative captions"),
        (captions(2), torch.tensor([1]), "got 2 captions and 1 negative labels"),
        (captions(3), captions(2), "got 3 captions and 2 negative captions"),
        (captions(2), captions(1, width=8), "captions of width 4 and negative ones of width 8"),
    ],
)
def test_negative_conditions_that_do_not_fit(y: Condition, negative: Condition, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        check_negative(y, negative)


def test_negative_conditions_that_fit():
    for y, negative in ((captions(3), captions(1)), (captions(3), captions(3, 9)), (torch.ones(2), torch.ones(1))):
        check_negative(y, negative)
        assert len(join([y[:1], negative])) == 1 + len(negative)
