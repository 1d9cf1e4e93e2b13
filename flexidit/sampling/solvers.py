"""Solvers are diffusers' schedulers: built here by name, or taken from the user, with the timesteps of one run set.

What was read in diffusers 0.42 and is worked around here:

* ``DDIMScheduler`` steps by ``num_train_timesteps // num_steps`` whatever its timesteps are, so with "linspace"
  spacing (or a step count that does not divide 1000) it jumps to another noise level than the next call assumes.
  "ddim" is therefore DPM-Solver++ of order one, which is DDIM with eta 0 on exactly the timesteps it lists.
* ``DPMSolverMultistepScheduler`` and ``SASolverScheduler`` with a learned variance keep the first *three* channels;
  latents have four. They are given the noise prediction only.
* One step with "linspace" spacing would be timestep 0: pure noise taken for data. One step starts at the noisiest.
* Timesteps on the device make every step a synchronisation (index look-ups, ``if t > 0``). They stay on the CPU.

PixArt has DiT's linear noise schedule, 1e-4 to 0.02, and the paper samples from it as PixArt's authors do: "ddpm" with
100 steps, "dpm++" with 20, "sa" with 25, guidance 4.5 (section 4.2, Figs. 22 to 24). "dpm++" is what diffusers'
``PixArtAlphaPipeline`` is shipped with: second order, "linspace" spacing.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeAlias

from torch import Tensor

from flexidit.diffusion.gaussian import even_timesteps

Solver: TypeAlias = Any
"""A diffusers scheduler: an interface (``set_timesteps``, ``timesteps``, ``step``) without a typed base class."""

SOLVERS = ("ddpm", "ddim", "dpm++", "sa")


def make_solver(
    solver: str | Solver, num_steps: int, *, num_train_timesteps: int = 1000, learn_sigma: bool = False
) -> Solver:
    """Solver with its timesteps set, ready for one run; several runs take one each, as solvers carry history.

    Args:
        solver: "ddpm" (with DiT's learned-range variance if the model has it, else the posterior variance), "ddim"
            (eta 0), "dpm++" (DPM-Solver++ 2M), "sa" (SA-Solver), all on DiT's linear noise schedule; or a diffusers
            scheduler, which is copied and used as configured.
        num_steps: number of denoising steps, as many as the schedule has.
        num_train_timesteps: length of the noise schedule that the model was trained on.
        learn_sigma: whether the model predicts the variance too.

    Raises:
        ValueError: an unknown name, a number of steps that the solver cannot take, or a solver that needs the
            learned variance of a model that has none.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"cannot sample in {num_steps} steps; take 1 to {num_train_timesteps}, as many as in training")
    if isinstance(solver, str):
        built = _by_name(solver, num_steps, num_train_timesteps, learn_sigma)
    else:
        built = _adopted(solver, num_steps, learn_sigma)
    _check_timesteps(built, num_steps)
    if hasattr(built, "set_begin_index"):
        built.set_begin_index(0)  # the solver then counts steps instead of searching for the timestep
    return built


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
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; give one of {', '.join(SOLVERS)} or a diffusers scheduler")
    multistep = DPMSolverMultistepScheduler if name == "dpm++" else SASolverScheduler
    built: Solver = multistep(num_train_timesteps, timestep_spacing="linspace")
    built.set_timesteps(num_steps, device="cpu")
    return built


def _adopted(solver: Solver, num_steps: int, learn_sigma: bool) -> Solver:
    if not hasattr(solver, "set_timesteps") or not hasattr(solver, "step"):
        raise ValueError(f"unknown solver {solver!r}; give one of {', '.join(SOLVERS)} or a diffusers scheduler")
    built = copy.deepcopy(solver)
    if uses_variance(built):
        if not learn_sigma:
            raise ValueError("the solver needs a learned variance, the model has none; set variance_type='fixed_small'")
    elif str(built.config.get("variance_type")).startswith("learned"):
        built.register_to_config(variance_type=None)
    built.set_timesteps(num_steps, device="cpu")
    return built


def _check_timesteps(solver: Solver, num_steps: int) -> None:
    timesteps = solver.timesteps
    if len(timesteps) != num_steps:
        raise ValueError(
            f"{type(solver).__name__} makes {len(timesteps)} model calls for {num_steps} steps; "
            "use a solver with one call a step, so that the schedule says which patch size each call has"
        )
    if len(timesteps.unique()) != num_steps:
        raise ValueError(f"{type(solver).__name__} repeats timesteps at {num_steps} steps; take fewer")
