"""Solvers are diffusers' schedulers: built here by name, or taken from the user, with the timesteps of one run set.

What was read in diffusers 0.42 and is worked around here:

* ``DDIMScheduler`` steps by ``num_train_timesteps // num_steps`` whatever its timesteps are, so with "linspace"
  spacing (or a step count that does not divide 1000) it jumps to another noise level than the next call assumes.
  "ddim" is therefore DPM-Solver++ of order one, which is DDIM with eta 0 on exactly the timesteps it lists.
* ``DPMSolverMultistepScheduler`` and ``SASolverScheduler`` with a learned variance keep the first *three* channels;
  latents have four. They are given the noise prediction only.
* One step with "linspace" spacing would be timestep 0: pure noise taken for data. One step starts at the noisiest.
* Timesteps on the device make every step a synchronisation (index look-ups, ``if t > 0``). They stay on the CPU.
* ``FlowMatchEulerDiscreteScheduler.set_timesteps(num_steps)`` shifts the lowest noise level twice and, without a shift,
  spends its last step on a level of 1 / 1000. "euler" is given the levels of UniPC there, Wan's to a thousandth.
* Flow solvers other than Euler tell the model times rounded down to whole numbers, as Wan's code does too; the levels
  they step through are not rounded. With a strong shift equal times stand for different levels, so that levels are what
  is checked, and steps are counted.
* ``SASolverScheduler`` ends a flow's last step at the noise level where that began: it is refused.

PixArt has DiT's linear noise schedule, 1e-4 to 0.02, and the paper samples from it as PixArt's authors do: "ddpm" with
100 steps, "dpm++" with 20, "sa" with 25, guidance 4.5 (section 4.2, Figs. 22 to 24). "dpm++" is what diffusers'
``PixArtAlphaPipeline`` is shipped with: second order, "linspace" spacing.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from flexidit.config import ProcessName
from flexidit.diffusion.gaussian import even_timesteps

Solver: TypeAlias = Any
"""A diffusers scheduler: an interface (``set_timesteps``, ``timesteps``, ``step``) without a typed base class."""

SOLVERS = ("ddpm", "ddim", "dpm++", "sa")
"""Names of those that step by predicted noise, the default first."""
FLOW_SOLVERS = ("unipc", "euler", "dpm++")
"""Names of those that step by predicted velocities, the default first."""


def make_solver(
    solver: str | Solver,
    num_steps: int,
    *,
    num_train_timesteps: int = 1000,
    learn_sigma: bool = False,
    process: ProcessName = "diffusion",
    time_shift: float | None = None,
) -> Solver:
    """Solver with its timesteps set, ready for one run; several runs take one each, as solvers carry history.

    Args:
        solver: "ddpm" (with DiT's learned-range variance if the model has it, else the posterior variance), "ddim"
            (eta 0), "dpm++" (DPM-Solver++ 2M), "sa" (SA-Solver), all on DiT's linear noise schedule; for a flow "unipc"
            (UniPC of order two), "euler" or "dpm++"; or a diffusers scheduler for the process, which is copied and used
            as configured.
        num_steps: number of denoising steps, as many as the schedule has.
        num_train_timesteps: length of the noise schedule that the model was trained on.
        learn_sigma: whether the model predicts the variance too.
        process: what the model predicts: noise, or the velocities of a flow.
        time_shift: of a flow and a solver by name, how far its levels are shifted towards noise, see
            ``diffusion.flow.shifted``; None: not at all, or as the given scheduler does.

    Raises:
        ValueError: an unknown name, a solver of the other process, a number of steps that it cannot take, one that
            needs the learned variance of a model that has none, or a shift where there is none.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"cannot sample in {num_steps} steps; take 1 to {num_train_timesteps}, as many as in training")
    _check_shift(time_shift, solver, process)
    if not isinstance(solver, str):
        built = _adopted(solver, num_steps, learn_sigma, process)
    elif solver not in solvers_of(process):
        raise ValueError(f"{_unfit(solver, process)}; {_accepted(process)}")
    elif process == "flow":
        built = _flow_by_name(solver, num_steps, num_train_timesteps, 1.0 if time_shift is None else time_shift)
    else:
        built = _by_name(solver, num_steps, num_train_timesteps, learn_sigma)
    _check_steps(built, num_steps, process)
    if hasattr(built, "set_begin_index"):
        built.set_begin_index(0)  # the solver then counts steps instead of searching for the timestep
    return built


def solvers_of(process: ProcessName) -> tuple[str, ...]:
    """Names of the solvers for a process, the default first."""
    return FLOW_SOLVERS if process == "flow" else SOLVERS


def default_solver(process: ProcessName) -> str:
    """DiT's for a diffusion, Wan's for a flow."""
    return solvers_of(process)[0]


def describe(solver: str | Solver, time_shift: float | None) -> str:
    """A solver in words, for records.

    Example:
        >>> describe("ddpm", None), describe("unipc", 5.0)
        ('ddpm', 'unipc (time shift 5)')
    """
    name = solver if isinstance(solver, str) else type(solver).__name__
    return name if time_shift is None else f"{name} (time shift {time_shift:g})"


def uses_variance(solver: Solver) -> bool:
    """Whether the solver reads the variance channels of the prediction."""
    from diffusers import DDPMScheduler

    learned = str(solver.config.get("variance_type")).startswith("learned")
    return learned and isinstance(solver, DDPMScheduler)


def descending_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Timesteps from the noisiest to 0, spread as DiT's respacing spreads them; a single one is the noisiest.

    diffusers' "linspace" spacing is the same but for rare roundings of positions on one half.

    Example:
        >>> descending_timesteps(5), descending_timesteps(1)
        ([999, 749, 500, 250, 0], [999])
    """
    if num_steps == 1:
        return [num_train_timesteps - 1]
    return even_timesteps(num_train_timesteps, num_steps)[::-1]


def flow_levels(num_steps: int, num_train_timesteps: int = 1000) -> npt.NDArray[np.float64]:
    """Noise levels of a flow's steps before they are shifted, evenly spread from 1, as diffusers' UniPC does.

    They end ``1 / num_steps`` or a little more above 0; from the last one the solver goes to data.

    Example:
        >>> flow_levels(3).round(3).tolist()
        [1.0, 0.667, 0.334]
    """
    return np.linspace(1, 1 / num_train_timesteps, num_steps + 1)[:-1]


def initial_sample(solver: Solver, noise: Tensor) -> Tensor:
    """Standard normal noise at the scale where the solver starts; a new tensor, the caller's stays as it is."""
    return noise * getattr(solver, "init_noise_sigma", 1.0)


def model_input(solver: Solver, x: Tensor, timestep: Tensor) -> Tensor:
    """What the model is shown; some solvers (Euler, Heun) keep their state at another scale."""
    return solver.scale_model_input(x, timestep) if hasattr(solver, "scale_model_input") else x


def takes_generator(solver: Solver) -> bool:
    """Whether ``solver.step`` may draw noise and can be told from which generators."""
    return "generator" in inspect.signature(solver.step).parameters


def _by_name(name: str, num_steps: int, num_train_timesteps: int, learn_sigma: bool) -> Solver:
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SASolverScheduler

    if name == "ddpm":
        # A single step ends in data and must not add noise; the posterior variance is zero there, the learned is not.
        variance = "learned_range" if learn_sigma and num_steps > 1 else "fixed_small"
        ddpm: Solver = DDPMScheduler(num_train_timesteps, variance_type=variance, clip_sample=False)
        ddpm.set_timesteps(timesteps=descending_timesteps(num_steps, num_train_timesteps), device="cpu")
        return ddpm
    if name == "ddim":
        ddim: Solver = DPMSolverMultistepScheduler(num_train_timesteps, solver_order=1)
        ddim.set_timesteps(timesteps=descending_timesteps(num_steps, num_train_timesteps), device="cpu")
        return ddim
    multistep = DPMSolverMultistepScheduler if name == "dpm++" else SASolverScheduler
    built: Solver = multistep(num_train_timesteps, timestep_spacing="linspace")
    built.set_timesteps(num_steps, device="cpu")
    return built


def _flow_by_name(name: str, num_steps: int, num_train_timesteps: int, shift: float) -> Solver:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if name == "euler":
        euler: Solver = FlowMatchEulerDiscreteScheduler(num_train_timesteps, shift=shift)
        euler.set_timesteps(sigmas=flow_levels(num_steps, num_train_timesteps).tolist(), device="cpu")
        return euler
    multistep = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    built: Solver = multistep(num_train_timesteps, **flow)
    built.set_timesteps(num_steps, device="cpu")
    return built


def _adopted(solver: Solver, num_steps: int, learn_sigma: bool, process: ProcessName) -> Solver:
    if not hasattr(solver, "set_timesteps") or not hasattr(solver, "step"):
        raise ValueError(f"unknown solver {solver!r}; {_accepted(process)}")
    _check_prediction(solver, process)
    built = copy.deepcopy(solver)
    if uses_variance(built):
        if not learn_sigma:
            raise ValueError("the solver needs a learned variance, the model has none; set variance_type='fixed_small'")
    elif str(built.config.get("variance_type")).startswith("learned"):
        built.register_to_config(variance_type=None)
    built.set_timesteps(num_steps, device="cpu")
    return built


def _check_prediction(solver: Solver, process: ProcessName) -> None:
    """Refuse a scheduler that would take the model's predictions for something else."""
    name, config = type(solver).__name__, solver.config
    is_matching = any(kind.__name__.startswith("FlowMatch") for kind in type(solver).__mro__)
    prediction = "flow_prediction" if is_matching else config.get("prediction_type", "epsilon")
    has_flow_levels = is_matching or bool(config.get("use_flow_sigmas"))
    wanted = "flow_prediction" if process == "flow" else "epsilon"
    if (prediction, has_flow_levels) != (wanted, process == "flow"):
        how = "" if is_matching else f" with prediction_type={prediction!r} and use_flow_sigmas={has_flow_levels}"
        raise ValueError(f"{name}{how} {_UNFIT[process]}; {_accepted(process)}")
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{name} shifts by the size of pictures; set use_dynamic_shifting=False and a shift of its own"
        )


def _check_shift(time_shift: float | None, solver: str | Solver, process: ProcessName) -> None:
    if time_shift is None:
        return
    if process != "flow":
        raise ValueError(f"time_shift={time_shift} is for models of a flow, and this one predicts noise; leave it out")
    if not isinstance(solver, str):
        raise ValueError(f"time_shift={time_shift} does not reach a given {type(solver).__name__}; set the shift there")
    if not 0 < time_shift < math.inf:
        raise ValueError(f"time_shift is a number above 0, and 1 shifts nothing; got {time_shift}")


_UNFIT: dict[ProcessName, str] = {
    "diffusion": "does not fit this model, which predicts noise",
    "flow": "does not fit this model, which predicts the velocities of a flow",
}


def _unfit(name: str, process: ProcessName) -> str:
    is_known = name in (*SOLVERS, *FLOW_SOLVERS)
    return f"solver {name!r} {_UNFIT[process]}" if is_known else f"unknown solver {name!r}"


def _accepted(process: ProcessName) -> str:
    kind = "flow-matching scheduler of diffusers" if process == "flow" else "diffusers scheduler for predicted noise"
    return f"give one of {', '.join(solvers_of(process))} or a {kind}"


def _check_steps(solver: Solver, num_steps: int, process: ProcessName) -> None:
    name, timesteps = type(solver).__name__, solver.timesteps
    if len(timesteps) != num_steps:
        raise ValueError(
            f"{name} makes {len(timesteps)} model calls for {num_steps} steps; "
            "use a solver with one call a step, so that the schedule says which patch size each call has"
        )
    if process == "flow" and not bool((solver.sigmas.diff() < 0).all()):
        raise ValueError(
            f"{name} does not lower the noise at each of {num_steps} steps; take fewer, less shift or another solver"
        )
    if process == "diffusion" and len(timesteps.unique()) != num_steps:
        raise ValueError(f"{name} repeats timesteps at {num_steps} steps; take fewer")
