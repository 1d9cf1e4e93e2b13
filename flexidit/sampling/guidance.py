"""Guidance: how a conditional and a guiding prediction become one (paper, section 3.4; READING.md 11).

With c the conditional and g the guiding prediction, the guided one is ``g + scale * (c - g)``. Which g is meant
follows from the two patch sizes of the step:

* equal: g is the *unconditional* prediction at the same size (classifier-free guidance), scale ``cfg_scale``;
* g larger, hence weaker: g is the *conditional* prediction of that weaker size, scale ``weak_guidance_scale``.

Shape legend: N batch, C latent channels, H W latent height and width. A model with learned variance returns 2C
channels, of which the first C are eps.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from flexidit.patch_size import PatchSize
from flexidit.sampling.schedule import ScheduleStep

Branch: TypeAlias = Literal["cond", "weak", "cond+uncond"]

SCALE_RATIO = 2.5
"""(1 - cfg_scale) / (1 - weak_guidance_scale), which the paper found best (appendix B.4, "More results on CFG")."""


class Forward(Protocol):
    """One forward pass of the model, told which branches its batch holds."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *, patch_size: PatchSize, branch: Branch) -> Tensor: ...


def coupled_weak_scale(cfg_scale: float) -> float:
    """Weak-model guidance scale that goes with a classifier-free guidance scale.

    Example:
        >>> coupled_weak_scale(4.0)
        2.2
        >>> coupled_weak_scale(1.0)
        1.0
    """
    return 1 + (cfg_scale - 1) / SCALE_RATIO


def scale_of(step: ScheduleStep, cfg_scale: float, weak_guidance_scale: float) -> float:
    """Guidance scale of one step; at 1.0 the guiding prediction cancels out and is not computed at all."""
    return cfg_scale if step.cond == step.guide else weak_guidance_scale


def predict_pair(
    forward: Forward, x: Tensor, t: Tensor, y: Tensor, null_y: Tensor, step: ScheduleStep
) -> tuple[Tensor, Tensor]:
    """Conditional and guiding prediction, each (N, C or 2C, H, W).

    Equal sizes share one forward pass of 2N sequences, conditional ones first; unequal sizes have unequal
    lengths and take one pass each ("approach 2" of Fig. 12: the fewest FLOPs). ``packing.py`` has other ways.
    """
    if step.cond == step.guide:
        both = forward(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null_y]), patch_size=step.cond, branch="cond+uncond"
        )
        cond, guiding = both.chunk(2)
        return cond, guiding
    cond = forward(x, t, y, patch_size=step.cond, branch="cond")
    guiding = forward(x, t, y, patch_size=step.guide, branch="weak")
    return cond, guiding


def combine(
    cond: Tensor, guiding: Tensor, scale: float, *, in_channels: int, guidance_channels: int | None = None
) -> Tensor:
    """Guided prediction, with the variance channels of the conditional one.

    Args:
        cond: (N, C or 2C, H, W).
        guiding: same shape.
        scale: 1.0 gives the conditional prediction.
        in_channels: C.
        guidance_channels: how many of the C channels are guided, the others staying conditional; ``None``: all.
            Official DiT guides the first three of four, and its published samples were made so.

    Returns:
        New tensor of the same shape.
    """
    guided = in_channels if guidance_channels is None else guidance_channels
    eps = guiding[:, :guided] + scale * (cond[:, :guided] - guiding[:, :guided])
    return torch.cat([eps, cond[:, guided:]], dim=1)
