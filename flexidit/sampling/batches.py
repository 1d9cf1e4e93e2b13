"""The batches of one call of a sampler: conditions, noise, and a generator for each sample.

Shape legend: N samples, n samples in one batch, C latent channels, H W latent height and width (F H W for clips).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexidit.conditions import Captions


@dataclass(frozen=True)
class Batch:
    """n samples that run together, padding included."""

    y: Tensor | Captions
    """n conditions."""
    negative: Tensor | Captions | None
    """n to guide away from; None: the model's own null condition."""
    noise: Tensor
    """(n, C, H, W)."""
    generators: list[torch.Generator]
    """One for each sample: the noise of its steps does not depend on what runs beside it."""
    num_real: int
    """Those that are no padding; they come first."""
    num_batches: int
    """Of the whole call."""


def draw_batches(
    y: Tensor | Captions,
    negative: Tensor | Captions | None,
    seeds: Sequence[int],
    noise: Tensor | None,
    shape: Sequence[int],
    batch_size: int | None,
    device: torch.device,
) -> Iterator[Batch]:
    """All samples in batches of equal size, the last one filled up with copies.

    Conditions are moved to the device batch by batch: ten thousand captions of T5-XXL take 10 GB.

    Args:
        y: N conditions.
        negative: as many, or one for all; None: none.
        seeds: one for each sample.
        noise: (N, C, H, W); None: drawn.
        shape: (N, C, H, W).
        batch_size: n; None: N.
        device: where the batches are to be.

    Raises:
        ValueError: a batch size below one.
    """
    width = len(y) if batch_size is None else batch_size
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1, or None for all samples at once")
    starts = range(0, len(y), max(width, 1))
    for start in starts:
        real = len(y[start : start + width])
        rows = torch.arange(start, start + width).clamp(max=len(y) - 1)  # repeats the last sample
        own = [*seeds[start : start + width], *[0] * (width - real)]
        generators = [torch.Generator(device).manual_seed(seed) for seed in own]
        drawn = torch.cat([torch.randn(1, *shape[1:], generator=g, device=device) for g in generators])
        if noise is not None:  # drawn all the same, so that the noise of later steps does not depend on it
            drawn = noise[rows].to(device, torch.float32)
        told = y[rows].to(device)
        away = None if negative is None else _sized_like(negative[_within(rows, negative)].to(device), told)
        yield Batch(told, away, drawn, generators, real, len(starts))


def draw_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """One for each sample; ``None`` takes the global generator."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()


def _within(rows: Tensor, conditions: Tensor | Captions) -> Tensor:
    return torch.zeros_like(rows) if len(conditions) == 1 else rows


def _sized_like(negative: Tensor | Captions, y: Tensor | Captions) -> Tensor | Captions:
    """Negative captions say nothing about the image's size, if they do not say so: it is that of ``y``."""
    if isinstance(negative, Captions) and isinstance(y, Captions) and negative.image_size is None:
        return replace(negative, image_size=y.image_size)
    return negative
