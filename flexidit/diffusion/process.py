"""What training needs of a process, whichever it is, and the process of a model.

Shape legend: N batch, C latent channels, ... any latent axes after them.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from flexidit.config import TransformerConfig
from flexidit.diffusion.flow import RectifiedFlow
from flexidit.diffusion.gaussian import GaussianDiffusion


class Process(Protocol):
    """How data become noise, what a model predicts about it, and which time the model is told.

    ``t`` are step indices (N,), 0 the least noisy; see :mod:`flexidit.diffusion`.
    """

    @property
    def num_timesteps(self) -> int:
        """Number of noise levels."""

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Times for the model at the step indices ``t``: (N,) -> (N,)."""

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Clean latents noised to level ``t``: (N, C, ...) -> (N, C, ...)."""

    def target(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """What the model is to predict of them: (N, C, ...)."""

    def predict_x_start(self, x_t: Tensor, t: Tensor, prediction: Tensor, /) -> Tensor:
        """Clean latents that ``x_t`` came from if that prediction is right: (N, C, ...)."""


def process_of(config: TransformerConfig) -> Process:
    """The process that models of a config are trained in."""
    return RectifiedFlow(shift=config.time_shift) if config.process == "flow" else GaussianDiffusion()
