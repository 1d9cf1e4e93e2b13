import pytest
import torch

from flexidit.patch_size import PatchSize
from flexidit.sampling.guidance import combine, coupled_weak_scale, predict_pair, scale_of
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
    cond, guiding = predict_pair(recorder, x, t, y, torch.tensor([10, 10]), step)
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
