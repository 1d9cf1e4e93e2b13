"""How far weak predictions are from powerful ones, over the noise level (paper, Fig. 4 right).

Shape legend: N batch, C latent channels, K timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexidit.diffusion.gaussian import GaussianDiffusion, split_output
from flexidit.patch_size import PatchSize


@torch.no_grad()
def weak_powerful_gap(
    model: Any, diffusion: GaussianDiffusion, x_start: Tensor, y: Tensor, noise: Tensor, timesteps: Sequence[int]
) -> dict[PatchSize, Tensor]:
    """Mean squared difference between each weak size's noise prediction and the base size's: {size: (K,)}.

    Args:
        model: has ``patch_sizes``, base first; called as ``model(x_t, t, y, patch_size=...)``.
        diffusion: the process that noises the latents.
        x_start: (N, C, H, W), clean latents.
        y: (N,), their labels.
        noise: like ``x_start``, the same at every timestep.
        timesteps: K step indices of ``diffusion``.
    """
    base, *weak = model.patch_sizes
    gaps: dict[PatchSize, list[Tensor]] = {size: [] for size in weak}
    for step in timesteps:
        t = torch.full((len(x_start),), step, device=x_start.device)
        x_t = diffusion.q_sample(x_start, t, noise)
        powerful = _eps(model, x_t, t, y, base)
        for size in weak:
            gaps[size].append((_eps(model, x_t, t, y, size) - powerful).square().mean())
    return {size: torch.stack(values) for size, values in gaps.items()}


def _eps(model: Any, x_t: Tensor, t: Tensor, y: Tensor, patch_size: PatchSize) -> Tensor:
    return split_output(model(x_t, t, y, patch_size=patch_size), x_t.shape[1])[0].float()
