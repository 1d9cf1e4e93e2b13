"""The gap against a model whose sizes differ by a known amount, and where they cannot differ."""

from __future__ import annotations

import torch
from torch import Tensor

from flexidit import create_model, flexify
from flexidit.analysis.gap import weak_powerful_gap
from flexidit.diffusion.flow import RectifiedFlow
from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.patch_size import PatchSize

BASE, WEAK, WEAKEST = PatchSize(1, 2, 2), PatchSize(1, 4, 4), PatchSize(1, 8, 8)


class Shifted:
    """Weak predictions are off by t / 1000 times the side of the patch; the variance channels are of no concern."""

    patch_sizes = (BASE, WEAK, WEAKEST)

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor, *, patch_size: PatchSize) -> Tensor:
        shift = 0.0 if patch_size == BASE else patch_size.h * t[0] / 1000
        return torch.cat([x_t + shift, torch.full_like(x_t, float(patch_size.h))], dim=1)


def test_the_gap_is_the_mean_squared_difference_of_the_noise_predictions() -> None:
    x = torch.randn(3, 2, 8, 8)
    gap = weak_powerful_gap(Shifted(), GaussianDiffusion(), x, torch.zeros(3), torch.randn_like(x), (100, 500))
    assert list(gap) == [WEAK, WEAKEST]
    torch.testing.assert_close(gap[WEAK], torch.tensor([0.4**2, 2.0**2]))
    torch.testing.assert_close(gap[WEAKEST], torch.tensor([0.8**2, 4.0**2]))


def test_a_model_of_a_flow_is_told_the_times_of_the_flow() -> None:
    """By t / 1000 times the side, at t = 1000 sigma: index 499 is level 0.75 at a shift of 3."""
    x = torch.randn(3, 2, 8, 8)
    gap = weak_powerful_gap(Shifted(), RectifiedFlow(shift=3.0), x, torch.zeros(3), torch.randn_like(x), (499, 999))
    torch.testing.assert_close(gap[WEAK], torch.tensor([3.0**2, 4.0**2]))


def test_there_is_no_gap_where_both_predict_nothing() -> None:
    model = flexify(create_model("DiT-Tiny/2", input_size=8, num_classes=10), [4]).eval()  # the output starts at zero
    x, y = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.long)
    gap = weak_powerful_gap(model, GaussianDiffusion(), x, y, torch.randn_like(x), (0, 999))
    assert gap[WEAK].tolist() == [0, 0]
    assert not gap[WEAK].requires_grad
