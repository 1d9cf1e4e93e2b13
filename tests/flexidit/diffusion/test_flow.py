"""Laws of rectified flow, and diffusers' flow-matching scheduler as a peer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from flexidit.diffusion.flow import RectifiedFlow, shifted
from flexidit.diffusion.losses import training_loss

SHIFTS = (0.5, 1.0, 3.0, 5.0, 12.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_timesteps", [1, 40, 1000])
def test_levels_are_those_of_diffusers(shift: float, num_timesteps: int) -> None:
    """Which run from noise to data there, in float32."""
    stock: Any = diffusers.FlowMatchEulerDiscreteScheduler(num_timesteps, shift=shift)
    flow = RectifiedFlow(num_timesteps, shift)
    torch.testing.assert_close(flow.sigmas.flip(0), stock.sigmas.double(), rtol=1e-6, atol=0)
    if num_timesteps == 1000:
        times = flow.model_timesteps(torch.arange(1000))
        torch.testing.assert_close(times.flip(0), stock.timesteps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", SHIFTS)
def test_noising_is_that_of_diffusers(shift: float) -> None:
    stock: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = RectifiedFlow(shift=shift)
    x, noise, t = normal(3, 2, 4, 4).float(), normal(3, 2, 4, 4, seed=1).float(), torch.tensor([0, 500, 999])
    theirs = stock.scale_noise(x, stock.timesteps[999 - t], noise)
    torch.testing.assert_close(flow.q_sample(x, t, noise), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
def test_times_rise_to_a_thousand_at_pure_noise(shift: float) -> None:
    flow = RectifiedFlow(50, shift)
    times = flow.model_timesteps(torch.arange(50))
    assert times.dtype == torch.float32 and times[0] > 0 and times[-1] == 1000
    assert bool((times.diff() > 0).all())
    noise = normal(1, 3)
    assert torch.equal(flow.q_sample(normal(1, 3, seed=1), torch.tensor([49]), noise), noise)


def test_a_larger_shift_is_noisier_and_shifts_multiply() -> None:
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert bool((shifted(s, 5.0)[1:-1] > shifted(s, 3.0)[1:-1]).all())
    assert torch.equal(shifted(s, 1.0), s)
    torch.testing.assert_close(shifted(shifted(s, 3.0), 4.0), shifted(s, 12.0), rtol=0, atol=1e-15)
    torch.testing.assert_close(shifted(shifted(s, 3.0), 1 / 3), s, rtol=0, atol=1e-15)
    assert shifted(0.0, 7.0) == 0.0 and shifted(1.0, 7.0) == 1.0


@pytest.mark.parametrize("shape", [(4,), (3, 4, 2), (2, 3, 4, 4)])
@pytest.mark.parametrize("shift", SHIFTS)
def test_predictions_invert_q_sample(shape: tuple[int, ...], shift: float) -> None:
    flow, t = RectifiedFlow(shift=shift), torch.tensor([0, 1, 400, 998, 999])
    x_start, noise = normal(5, *shape), normal(5, *shape, seed=1)
    x_t, velocity = flow.q_sample(x_start, t, noise), flow.velocity(x_start, noise)
    torch.testing.assert_close(flow.predict_x_start(x_t, t, velocity), x_start, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.predict_noise(x_t, t, velocity), noise, rtol=0, atol=1e-12)


def test_latents_move_at_their_velocity() -> None:
    flow, x_start, noise = RectifiedFlow(shift=3.0), normal(2, 3), normal(2, 3, seed=1)
    early, late = torch.tensor([100, 700]), torch.tensor([101, 990])
    moved = flow.q_sample(x_start, late, noise) - flow.q_sample(x_start, early, noise)
    passed = (flow.sigmas[late] - flow.sigmas[early]).unsqueeze(1)
    torch.testing.assert_close(moved, passed * flow.velocity(x_start, noise))


def test_the_loss_is_the_mean_squared_error_of_the_velocity() -> None:
    flow, x, noise, t = RectifiedFlow(), normal(3, 2, 4), normal(3, 2, 4, seed=1), torch.tensor([3, 500, 999])
    output, x_t = normal(3, 2, 4, seed=2).requires_grad_(), flow.q_sample(x, t, noise)
    losses = training_loss(flow, output, x, x_t, t, noise, learn_sigma=False)
    torch.testing.assert_close(losses.total, (output - (noise - x)).square().mean((1, 2)))
    assert torch.equal(losses.total, losses.mse) and not losses.vb.any()
    perfect = training_loss(flow, flow.velocity(x, noise), x, x_t, t, noise, learn_sigma=False)
    assert not perfect.total.any()


def test_a_flow_has_no_variance_to_learn() -> None:
    x, t = normal(1, 2, 4), torch.tensor([3])
    with pytest.raises(ValueError, match=r"a RectifiedFlow has no variance to learn; give learn_sigma=False"):
        training_loss(RectifiedFlow(), normal(1, 4, 4), x, x, t, x, learn_sigma=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_are_at_least_float32(dtype: torch.dtype) -> None:
    x, noise, t = normal(2, 3).to(dtype), normal(2, 3, seed=1).to(dtype), torch.tensor([3, 800])
    x_t = RectifiedFlow().q_sample(x, t, noise)
    assert x_t.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(x_t.double(), RectifiedFlow().q_sample(x.double(), t, noise.double()))


def test_first_use_in_inference_mode_does_not_spoil_later_gradients() -> None:
    with torch.inference_mode():
        flow = RectifiedFlow(shift=2.0)
        flow.q_sample(torch.zeros(1, 1), torch.tensor([3]), torch.zeros(1, 1))
    x = torch.zeros(1, 1, requires_grad=True)
    flow.q_sample(x, torch.tensor([3]), torch.ones(1, 1)).sum().backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(1 - flow.sigmas[3].item())


def test_tables_survive_a_default_meta_device() -> None:
    with torch.device("meta"):
        flow = RectifiedFlow()
    assert flow.model_timesteps(torch.tensor([999])).item() == 1000


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["deepcopy", "pickle"])
def test_copies_work(copier: Callable[[RectifiedFlow], RectifiedFlow]) -> None:
    flow, t = RectifiedFlow(shift=5.0), torch.tensor([10])
    expected = flow.q_sample(torch.ones(1, 1), t, torch.zeros(1, 1))
    assert torch.equal(copier(flow).q_sample(torch.ones(1, 1), t, torch.zeros(1, 1)), expected)


@pytest.mark.parametrize("values", [(0, 1.0), (1000, 0.0), (1000, -1.0), (1000, float("nan")), (1000, float("inf"))])
def test_impossible_flows_are_refused(values: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="one step or more and a shift above 0"):
        RectifiedFlow(*values)
