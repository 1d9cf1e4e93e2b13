"""Rectified flow: straight lines from data to noise, and the velocity along them as what a model predicts.

At noise level sigma, x_t = (1 - sigma) x_start + sigma noise (Liu et al. 2023; Esser et al. 2024), so that the velocity
d x_t / d sigma is ``noise - x_start`` at every level. Lines, levels and times are those of Wan 2.1 and of diffusers'
flow-matching schedulers.

Shape legend: N batch, C latent channels, ... any latent axes after them (H, W or F, H, W), S steps.
Time runs from t = 0 (data) to noise; ``t`` is a step index, see ``flexidit.diffusion``.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from flexidit.diffusion.tables import StepTables

Level = TypeVar("Level", float, Tensor)

TIME_SCALE = 1000.0
"""The model's time at sigma = 1, whatever the number of steps."""


def shifted(s: Level, shift: float) -> Level:
    """Noise levels moved towards noise by a ``shift`` above 1; 0 and 1 stay (Esser et al. 2024, eq. 23).

    The more elements latents have, the more noise it takes to hide their coarse structure: large clips want a large
    shift. Shifts multiply: one by a and then one by b is one by a * b, and 1 / a undoes a.

    Example:
        >>> shifted(0.5, 3.0), shifted(shifted(0.5, 3.0), 1 / 3)
        (0.75, 0.5)
    """
    return shift * s / (1 + (shift - 1) * s)


class RectifiedFlow:
    """Straight lines from data to noise, at ``num_timesteps`` levels that training draws from.

    Step index t stands for the evenly spread level s = (t + 1) / num_timesteps, moved by :func:`shifted`: the last one
    is pure noise, the first one almost data. Indices are drawn uniformly, as Wan's fine-tuning code draws them.

    Tables are float64 and outside any module, step indices are not range-checked: see :class:`StepTables`.

    Example:
        >>> flow = RectifiedFlow(num_timesteps=4, shift=3.0)
        >>> flow.sigmas.tolist()
        [0.5, 0.75, 0.9, 1.0]
        >>> flow.model_timesteps(torch.tensor([0, 3])).tolist()
        [500.0, 1000.0]
    """

    def __init__(self, num_timesteps: int = 1000, shift: float = 1.0) -> None:
        """Levels of a flow.

        Raises:
            ValueError: no step, or a shift that is not above 0.
        """
        if num_timesteps < 1 or not 0 < shift < math.inf:
            raise ValueError(f"a flow needs one step or more and a shift above 0, got {num_timesteps=}, {shift=}")
        self.num_timesteps, self.shift = num_timesteps, shift
        with torch.inference_mode(False), torch.no_grad():
            steps = torch.arange(1, num_timesteps + 1, dtype=torch.float64, device="cpu")
            self.sigmas = shifted(steps / num_timesteps, shift)  # (S,)
            rows = {"sigma": self.sigmas, "signal": 1 - self.sigmas, "timestep": TIME_SCALE * self.sigmas}
            self._tables = StepTables(rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_timesteps={self.num_timesteps}, shift={self.shift:g})"

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Times for the model at the step indices ``t``, 1000 sigma: (N,) -> (N,), float32 in (0, 1000]."""
        return self._tables.lookup("timestep", t).float()

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Clean latents noised to level ``t``: (N, C, ...) -> (N, C, ...)."""
        return self._coefficient("signal", t, x_start) * x_start + self._coefficient("sigma", t, x_start) * noise

    def velocity(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """From data to noise, the same at every level: (N, C, ...)."""
        return noise - x_start

    def target(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """What a model of this process predicts: the velocity."""
        return self.velocity(x_start, noise)

    def predict_x_start(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """Clean latents that ``x_t`` came from if its velocity was that: (N, C, ...)."""
        return x_t - self._coefficient("sigma", t, x_t) * velocity

    def predict_noise(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """Noise that ``x_t`` holds if its velocity was that: (N, C, ...)."""
        return x_t + self._coefficient("signal", t, x_t) * velocity

    def _coefficient(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        return self._tables.coefficient(name, t, x)
