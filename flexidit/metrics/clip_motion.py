"""Temporal flicker and motion smoothness of clips, as VBench (Huang et al. 2023) defines them.

Both compare frames by their mean absolute difference on the 256 levels of a saved picture, MAE, and give
``(255 - MAE) / 255``: 1 is a clip that stands still. They say nothing about whether anything should move, so they are
read beside a Frechet distance over clips, and compared with the values of real clips.

VBench's third measure of motion, the dynamic degree, thresholds the optical flow of a trained network (RAFT): without
its weights there is no such number, and none is made up here.

Shape legend: N clips, C channels, F frames, H W height and width in pixels, M pairs of frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from flexidit.metrics.features import to_byte_levels

Interpolator: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""Levels 0 to 255 of frames before and after, (M, C, H, W) float32 each -> those in the middle, (M, C, H, W)."""


def average(before: Tensor, after: Tensor) -> Tensor:
    """The interpolation that needs no weights: (M, C, H, W) twice -> (M, C, H, W)."""
    return (before + after) / 2


def temporal_flicker(clips: Tensor) -> Tensor:
    """VBench's temporal flickering, of neighbouring frames: (N, C, F, H, W) in [-1, 1] -> (N,), 1 is none.

    Raises:
        ValueError: not clips, or fewer than two frames.

    Example:
        >>> import torch
        >>> temporal_flicker(torch.tensor([-1.0, 1.0, 1.0]).view(1, 1, 3, 1, 1)).tolist()
        [0.5]
    """
    levels = _levels(clips, num_frames=2)
    return _score(levels[:, :, 1:], levels[:, :, :-1])


def motion_smoothness(clips: Tensor, interpolate: Interpolator = average) -> Tensor:
    """VBench's motion smoothness: (N, C, F, H, W) in [-1, 1] -> (N,).

    Every other frame is dropped, interpolated from its neighbours, and compared with what it was; a last frame without
    a right neighbour is left out. VBench interpolates with AMT-S, a trained network: numbers compare only with numbers
    of the same interpolator. The average, the default, calls smooth what fades as well as what moves slowly.

    Args:
        clips: (N, C, F, H, W).
        interpolate: Finds frames in the middle. Levels that it returns are cut down to whole ones, as VBench does.

    Raises:
        ValueError: not clips, or fewer than three frames.

    Example:
        >>> import torch
        >>> motion_smoothness(torch.tensor([-1.0, 1.0, -1.0]).view(1, 1, 3, 1, 1)).tolist()
        [0.0]
    """
    levels = _levels(clips, num_frames=3)
    kept = levels[:, :, ::2].transpose(1, 2)  # (N, K, C, H, W)
    before, after = kept[:, :-1].flatten(0, 1), kept[:, 1:].flatten(0, 1)  # (N * (K - 1), C, H, W)
    found = interpolate(before, after).clamp(0, 255).floor().view(len(clips), -1, *before.shape[1:])
    dropped = levels[:, :, 1::2].transpose(1, 2)[:, : found.shape[1]]
    return _score(dropped, found)


def _levels(clips: Tensor, num_frames: int) -> Tensor:
    if clips.ndim != 5 or clips.shape[2] < num_frames:
        raise ValueError(
            f"clips of shape (N, C, F, H, W) with {num_frames} frames or more are needed, got {tuple(clips.shape)}"
        )
    return to_byte_levels(clips)


def _score(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 for equal levels, 0 for black against white: (N, ...) twice -> (N,)."""
    return 1 - (ours - theirs).abs().flatten(1).mean(dim=1) / 255
