"""How far weak predictions are from powerful ones, over the noise level (paper, Fig. 4 right).

Shape legend: N batch, C latent channels, K timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexidit.diffusion.gaussian import split_output
from flexidit.diffusion.process import Process
from flexidit.patch_size import PatchSize


@torch.no_grad()
def weak_powerful_gap(
    model: Any, process: Process, x_start: Tensor, y: Tensor, noise: Tensor, timesteps: Sequence[int]
) -> dict[PatchSize, Tensor]:
    """Mean squared difference between each weak size's prediction and the base size's: {size: (K,)}.

    Of the noise, or of the velocity where the process is a flow.

    Args:
        model: has ``patch_sizes``, base first; called as ``model(x_t, t, y, patch_size=...)``.
        process: what noises the latents.
        x_start: (N, C, H, W), clean latents.
        y: (N,), their labels.
        noise: like ``x_start``, the same at every timestep.
        timesteps: K step indices of ``process``.
    """
    base, *weak = model.patch_sizes
    gaps: dict[PatchSize, list[Tensor]] = {size: [] for size in weak}
    for step in timesteps:
        t = torch.full((len(x_start),), step, device=x_start.device)
        x_t, times = process.q_sample(x_start, t, noise), process.model_timesteps(t)
        powerful = _prediction(model, x_t, times, y, base)
        for size in weak:
            gaps[size].append((_prediction(model, x_t, times, y, size) - powerful).square().mean())
    return {size: torch.stack(values) for size, values in gaps.items()}


def _prediction(model: Any, x_t: Tensor, t: Tensor, y: Tensor, patch_size: PatchSize) -> Tensor:
    return split_output(model(x_t, t, y, patch_size=patch_size), x_t.shape[1])[0].float()
