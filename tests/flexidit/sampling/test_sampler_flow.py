"""Sampling from models of a flow: the moments of a known distribution, and stock loops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from flexidit import PatchSchedule, Sampler, create_model, flexify
from flexidit.diffusion.flow import shifted
from flexidit.merged import MergedModel
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize
from flexidit.sampling.solvers import FLOW_SOLVERS, flow_levels

FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


class GaussianFlow:
    """The exact velocity of data ~ N(mean_y, std^2), each element independent; the null label has mean 0."""

    in_channels, input_size, learn_sigma = 4, (8, 8), False
    patch_sizes = (PatchSize.parse(2), PatchSize.parse(4))

    def __init__(self, std: float = 0.5, time_shift: float = 1.0) -> None:
        self.std, self.times = std, list[float]()
        self.config = SimpleNamespace(process="flow", time_shift=time_shift)

    def null_condition(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *, patch_size: PatchSize) -> Tensor:
        assert t.dtype == torch.float32
        self.times.append(t[0].item())
        sigma = t[0].item() / 1000  # x = (1 - sigma) x_start + sigma noise
        mean = y.to(x.dtype).view(-1, *(1 for _ in x.shape[1:])) / 4
        variance = (1 - sigma) ** 2 * self.std**2 + sigma**2
        return (sigma - (1 - sigma) * self.std**2) / variance * (x - (1 - sigma) * mean) - mean


def constant(num_steps: int, size: int = 2) -> PatchSchedule:
    return PatchSchedule.constant(size, num_steps)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model(randomised: Callable[..., nn.Module]) -> FlexiTransformer:
    fields = {"input_size": 8, "depth": 1, "process": "flow", "time_shift": 3.0, "learn_sigma": False}
    return randomised(create_model("DiT-Tiny/2", num_classes=10, **fields)).eval()  # type: ignore[return-value]


@pytest.mark.parametrize(("solver", "num_steps"), [("euler", 300), ("unipc", 40), ("dpm++", 60), (None, 40)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samples_of_a_gaussian_have_its_moments(solver: str | None, num_steps: int, shift: float) -> None:
    sampler = Sampler(GaussianFlow(time_shift=shift), solver, schedule=constant(num_steps))
    samples = sampler([3] * 16, size=(32, 32), generator=seeded())  # 65536 elements: standard error 0.002
    assert samples.mean().item() == pytest.approx(0.75, abs=0.01)
    assert samples.std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
def test_clips_are_sampled_alike(solver: str) -> None:
    sampler = Sampler(GaussianFlow(), solver, schedule=constant(60))
    clips = sampler([3] * 4, size=(4, 32, 32), generator=seeded())
    assert clips.shape == (4, 4, 4, 32, 32)
    assert (clips.mean().item(), clips.std().item()) == pytest.approx((0.75, 0.5), abs=0.02)


def test_guidance_moves_the_mean_as_the_formula_says() -> None:
    sampler = Sampler(GaussianFlow(), schedule=constant(40), cfg_scale=2.0)
    samples = sampler([3] * 16, size=(32, 32), generator=seeded())
    assert (samples.mean().item(), samples.std().item()) == pytest.approx((1.5, 0.5), abs=0.01)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_is_a_loop_of_one_line(model: FlexiTransformer, shift: float) -> None:
    noise, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 7])
    levels = [*shifted(torch.from_numpy(flow_levels(6)), shift).tolist(), 0.0]
    x = noise
    with torch.no_grad():
        for sigma, following in pairwise(levels):
            x = x + (following - sigma) * model(x, torch.full((2,), 1000 * sigma), y, patch_size=2)
    ours = Sampler(model, "euler", schedule=constant(6), time_shift=shift)(y, noise=noise)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def stock_solver(name: str) -> Any:
    kind = {"unipc": diffusers.UniPCMultistepScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}[name]
    return kind(**FLOW, flow_shift=3.0)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_equals_a_plain_diffusers_loop(model: FlexiTransformer, name: str) -> None:
    """The loop of a stock pipeline with classifier-free guidance; the shift is that of the model's config."""
    noise, y, scale, solver = torch.randn(2, 4, 8, 8), torch.tensor([1, 7]), 3.0, stock_solver(name)
    solver.set_timesteps(10)
    x = noise
    with torch.no_grad():
        for t in solver.timesteps:
            both = model(torch.cat([x, x]), t.repeat(4), torch.cat([y, torch.full_like(y, 10)]), patch_size=2)
            cond, uncond = both.chunk(2)
            x = solver.step(uncond + scale * (cond - uncond), t, x).prev_sample
    for chosen in (name, stock_solver(name)):
        ours = Sampler(model, chosen, schedule=constant(10), cfg_scale=scale)(y, noise=noise)
        assert torch.equal(ours, x)


def test_the_default_is_unipc_at_the_shift_of_training(model: FlexiTransformer) -> None:
    noise, y = torch.randn(1, 4, 8, 8), torch.tensor([1])
    plain = Sampler(model, schedule=constant(5))
    assert (plain.solver, plain.time_shift, plain.solver_name) == ("unipc", 3.0, "unipc (time shift 3)")
    expected = plain(y, noise=noise)
    assert torch.equal(Sampler(model, "unipc", schedule=constant(5), time_shift=3.0)(y, noise=noise), expected)
    other = Sampler(model, schedule=constant(5), time_shift=1.0)
    assert not torch.allclose(other(y, noise=noise), expected)
    assert plain.trace[2].timestep > other.trace[2].timestep
    diffusion = Sampler(create_model("DiT-Tiny/2", input_size=8), schedule=constant(5))
    assert (diffusion.solver, diffusion.time_shift, diffusion.solver_name) == ("ddpm", None, "ddpm")


def test_a_given_scheduler_keeps_its_own_shift(model: FlexiTransformer) -> None:
    given = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    sampler = Sampler(model, given, schedule=constant(4))
    sampler([1], generator=seeded())
    stock: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    stock.set_timesteps(4)
    assert [call.timestep for call in sampler.trace] == stock.timesteps.tolist()
    assert sampler.time_shift is None


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
def test_samples_do_not_depend_on_the_batch_split(solver: str) -> None:
    sampler = Sampler(GaussianFlow(), solver, schedule=constant(8), cfg_scale=2.0)
    together = sampler(torch.arange(8), generator=seeded())
    for batch_size in (1, 3, 20):
        torch.testing.assert_close(
            together, sampler(torch.arange(8), generator=seeded(), batch_size=batch_size), rtol=1e-6, atol=1e-6
        )


def test_a_student_and_its_merged_copy_are_flows_too(model: FlexiTransformer) -> None:
    student = flexify(model, [4], recipe="lora", rank=2)
    schedule, y = PatchSchedule.parse("4:3,2:3"), torch.tensor([1, 2])
    samplers = [Sampler(m, schedule=schedule, cfg_scale=2.0) for m in (student, MergedModel(student))]
    assert {sampler.solver_name for sampler in samplers} == {"unipc (time shift 3)"}
    ours, merged = (sampler(y, generator=seeded()) for sampler in samplers)
    torch.testing.assert_close(ours, merged, rtol=1e-4, atol=1e-4)
    full = [Sampler(m, schedule=constant(4))(y, generator=seeded()) for m in (model, student)]
    assert torch.equal(*full)


def test_wrong_pairs_are_refused_before_anything_runs(model: FlexiTransformer) -> None:
    with pytest.raises(ValueError, match="'ddpm' does not fit this model, which predicts the velocities of a flow"):
        Sampler(model, "ddpm", schedule=constant(4))
    with pytest.raises(ValueError, match="'unipc' does not fit this model, which predicts noise"):
        Sampler(create_model("DiT-Tiny/2", input_size=8), "unipc", schedule=constant(4))
    with pytest.raises(ValueError, match="is for models of a flow"):
        Sampler(create_model("DiT-Tiny/2", input_size=8), schedule=constant(4), time_shift=3.0)
