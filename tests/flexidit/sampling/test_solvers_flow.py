"""Solvers of flows: the levels they step through, and which pairs of solver and model are refused."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from flexidit.diffusion.flow import RectifiedFlow, shifted
from flexidit.sampling.solvers import (
    FLOW_SOLVERS,
    SOLVERS,
    default_solver,
    describe,
    flow_levels,
    make_solver,
    uses_variance,
)

SHIFTS = (0.5, 1.0, 3.0, 5.0, 12.0)
COUNTS = (1, 2, 7, 50, 250)
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def flow_solver(solver: Any, num_steps: int, shift: float | None = None) -> Any:
    return make_solver(solver, num_steps, process="flow", time_shift=shift)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize(
    ("name", "stock"), [("unipc", diffusers.UniPCMultistepScheduler), ("dpm++", diffusers.DPMSolverMultistepScheduler)]
)
def test_levels_are_those_of_stock_schedulers(name: str, stock: Any, shift: float, num_steps: int) -> None:
    theirs = stock(**FLOW, flow_shift=shift)
    theirs.set_timesteps(num_steps)
    ours = flow_solver(name, num_steps, shift)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", COUNTS)
def test_euler_steps_through_the_levels_of_unipc(shift: float, num_steps: int) -> None:
    """Which starts one millionth below pure noise, where a logarithm would be infinite."""
    euler, unipc = (flow_solver(name, num_steps, shift) for name in ("euler", "unipc"))
    torch.testing.assert_close(euler.sigmas, unipc.sigmas, rtol=0, atol=2e-6)
    stock: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / 1000, num_steps + 1)[:-1])
    assert torch.equal(euler.sigmas, stock.sigmas) and torch.equal(euler.timesteps, stock.timesteps)


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_thousand_levels_are_those_of_training(shift: float) -> None:
    """But for the thousandth that solvers leave out at one end or the other."""
    training = RectifiedFlow(shift=shift).sigmas.flip(0)
    for name in FLOW_SOLVERS:
        levels = flow_solver(name, 1000, shift).sigmas[:-1].double()
        even = (shifted(sigmas, 1 / shift) for sigmas in (levels, training))
        torch.testing.assert_close(*even, rtol=0, atol=1.02e-3)


@pytest.mark.parametrize("name", FLOW_SOLVERS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50, 999])
def test_any_number_of_steps_goes_from_noise_to_data(name: str, shift: float, num_steps: int) -> None:
    solver = flow_solver(name, num_steps, shift)
    assert len(solver.timesteps) == num_steps and len(solver.sigmas) == num_steps + 1
    assert (solver.sigmas.diff() < 0).all() and solver.sigmas[-1] == 0 and solver.timesteps.device.type == "cpu"
    assert 1 - solver.sigmas[0] <= 0.0021 and solver.timesteps[0] >= 997
    assert (solver.timesteps / 1000 - solver.sigmas[:-1]).abs().max() < 0.001 + 1e-6


def test_equal_times_of_different_levels_are_no_hindrance() -> None:
    """UniPC rounds times down, so that a strong shift repeats them; it steps by levels all the same."""
    solver = flow_solver("unipc", 500, 12.0)
    assert len(solver.timesteps.unique()) < 500 == len(solver.sigmas[:-1].unique())
    x = torch.ones(1, 1, 2, 2)
    for timestep in solver.timesteps:  # straight lines to zero: x = sigma * x_1, and the velocity is x_1
        x = solver.step(torch.ones_like(x), timestep, x).prev_sample
    torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-4)


def test_levels_too_close_for_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="at each of 1000 steps; take fewer, less shift or another"):
        flow_solver("unipc", 1000, 1e6)


def test_levels_before_the_shift_are_even() -> None:
    levels = flow_levels(40)
    assert levels[0] == 1 and len(levels) == 40
    np.testing.assert_allclose(np.diff(levels), -(1 - 0.001) / 40)


def test_names_and_defaults() -> None:
    assert (default_solver("diffusion"), default_solver("flow")) == ("ddpm", "unipc")
    assert describe("euler", 3.0) == "euler (time shift 3)"
    assert describe(diffusers.UniPCMultistepScheduler(), None) == "UniPCMultistepScheduler"
    assert not any(uses_variance(flow_solver(name, 4)) for name in FLOW_SOLVERS)


@pytest.mark.parametrize(
    "given",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
        diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0, solver_order=3),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_given_scheduler_of_flows_is_taken_as_it_is(given: Any) -> None:
    stock = type(given).from_config(given.config)
    stock.set_timesteps(9)
    before = given.sigmas.clone()
    built = flow_solver(given, 9)
    assert built is not given and torch.equal(given.sigmas, before)
    assert torch.equal(built.sigmas, stock.sigmas)


@pytest.mark.parametrize(
    ("solver", "complaint"),
    [
        *((name, f"solver '{name}' does not fit .* velocities of a flow; give one of uni") for name in ("ddpm", "sa")),
        ("eluer", r"unknown solver 'eluer'; give one of unipc, euler, dpm\+\+ or a flow-matching scheduler"),
        (42, "unknown solver 42; give one of unipc"),
        (diffusers.DDPMScheduler(), "DDPMScheduler with prediction_type='epsilon' .* does not fit this model"),
        (diffusers.UniPCMultistepScheduler(), "use_flow_sigmas=False does not fit"),
        (
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"),
            "prediction_type='flow_prediction' and use_flow_sigmas=False does not fit",
        ),
        (diffusers.FlowMatchHeunDiscreteScheduler(), "makes 19 model calls for 10 steps"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "set use_dynamic_shifting=False"),
        (diffusers.SASolverScheduler(**FLOW), "does not lower the noise"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "does not lower the noise"),
    ],
)
def test_what_does_not_fit_a_flow_is_refused(solver: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        flow_solver(solver, 10)


@pytest.mark.parametrize(
    ("solver", "complaint"),
    [
        ("unipc", "solver 'unipc' does not fit this model, which predicts noise; give one of ddpm, ddim"),
        ("euler", "solver 'euler' does not fit this model, which predicts noise"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler does not fit this model"),
        (diffusers.UniPCMultistepScheduler(**FLOW), "prediction_type='flow_prediction' .* does not fit"),
        (diffusers.DDPMScheduler(prediction_type="v_prediction"), "prediction_type='v_prediction' .* does not fit"),
    ],
)
def test_what_does_not_fit_a_diffusion_is_refused(solver: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_solver(solver, 10)


def test_both_processes_know_dpm_solver() -> None:
    assert set(SOLVERS) & set(FLOW_SOLVERS) == {"dpm++"}
    assert make_solver("dpm++", 5).config.prediction_type == "epsilon"
    assert flow_solver("dpm++", 5).config.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"solver": "ddpm", "process": "diffusion", "time_shift": 1.0}, "is for models of a flow"),
        ({"solver": "unipc", "time_shift": 0.0}, "time_shift is a number above 0"),
        ({"solver": "unipc", "time_shift": float("nan")}, "time_shift is a number above 0"),
        ({"solver": diffusers.UniPCMultistepScheduler(**FLOW), "time_shift": 3.0}, "set the shift there"),
    ],
)
def test_shifts_that_cannot_be_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_solver(num_steps=5, **{"process": "flow", **options})
