"""What the sampler needs of a model, and what it asks of one.

Shape legend: n samples in one batch, C latent channels, H W latent height and width (F H W for clips).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexidit.config import ProcessName
from flexidit.patch_size import PatchSize


class Denoiser(Protocol):
    """What the sampler needs of a model; ``flexidit.models`` satisfies it, and so does any callable with these.

    One that says ``can_pack = True`` is a :class:`PackingDenoiser` as well. One with ``prepare(y)`` is called with
    what that returns, computed once per batch of a run. One with a ``config`` whose ``process`` is "flow" predicts
    velocities, at noise levels shifted by the config's ``time_shift``; all others predict noise.
    """

    @property
    def patch_sizes(self) -> Sequence[PatchSize]:
        """Every size it accepts, base first."""

    @property
    def in_channels(self) -> int:
        """C."""

    @property
    def learn_sigma(self) -> bool:
        """Whether it returns 2C channels, the last C being the variance."""

    @property
    def input_size(self) -> Sequence[int]:
        """Latent size (H, W) or (F, H, W)."""

    def null_condition(self, y: Any) -> Any:
        """Conditions of the unconditional prediction, as many as ``y``; not asked for where negative ones are given."""

    def __call__(self, x: Tensor, t: Tensor, y: Any, *, patch_size: PatchSize) -> Tensor:
        """(n, C, H, W), (n,), n conditions -> (n, C or 2C, H, W)."""


def process_of(model: object) -> ProcessName:
    """What its predictions mean: "diffusion", noise, or "flow", velocities; noise, unless its config says otherwise."""
    return getattr(getattr(model, "config", None), "process", "diffusion")


def time_shift_of(model: object) -> float:
    """How far the noise levels of a flow were shifted in training; 1: not."""
    return getattr(getattr(model, "config", None), "time_shift", 1.0)


def device_of(model: Denoiser) -> torch.device:
    """Where its parameters are; the CPU for a plain callable."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def dtype_of(model: Denoiser) -> torch.dtype:
    """That of its floating-point parameters; float32 for a plain callable."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


@contextmanager
def eval_mode(model: Denoiser) -> Iterator[None]:
    """Evaluation mode inside; afterwards each submodule is in the mode it was in (frozen parts may be in eval)."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
