"""Clips as pictures: contact sheets, frames side by side; and grids of clips that move.

Shape legend: K clips of a row, C channels (1 or 3), F frames, H W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as nn_functional
from torch import Tensor

from flexidit.pictures import GridRow, draw_grid

if TYPE_CHECKING:
    from PIL import Image

MOST_FRAMES = 8
"""Columns of a contact sheet."""
_MOST_SIDE = 224  # pixels of a frame on a sheet; larger ones are made smaller


@dataclass(frozen=True)
class ClipRow:
    """A clip, and what to write in front of its frames."""

    clip: Tensor
    """(C, F, H, W) in [-1, 1]; values outside are clipped."""
    label: str
    note: str = ""
    """A second, fainter line."""


@dataclass(frozen=True)
class ClipsRow:
    """Clips side by side, and what to write in front of them."""

    clips: Tensor
    """(K, C, F, H, W) in [-1, 1]; values outside are clipped."""
    label: str
    note: str = ""


def even_frames(num_frames: int, count: int = MOST_FRAMES) -> list[int]:
    """Indices of the first, the last, and evenly spaced frames between.

    Example:
        >>> even_frames(81, 5), even_frames(3, 5), even_frames(9, 1)
        ([0, 20, 40, 60, 80], [0, 1, 2], [0])
    """
    count = min(count, num_frames)
    return [round(place * (num_frames - 1) / max(1, count - 1)) for place in range(count)]


def contact_sheet(rows: Sequence[ClipRow], title: str = "", num_frames: int = MOST_FRAMES) -> Image.Image:
    """Evenly spaced frames of each clip, side by side, clips below one another.

    Raises:
        ValueError: no rows, or clips of unequal size or length.
    """
    if len({row.clip.shape for row in rows}) != 1:
        raise ValueError(f"a contact sheet needs clips, all of one shape, got {[tuple(r.clip.shape) for r in rows]}")
    chosen = even_frames(rows[0].clip.shape[1], num_frames)
    pictures = [GridRow(_shrunk(row.clip[:, chosen].transpose(0, 1)), row.label, row.note) for row in rows]
    return draw_grid(pictures, title, [f"frame {frame}" for frame in chosen])


def animated_grid(rows: Sequence[ClipsRow], title: str = "", columns: Sequence[str] = ()) -> list[Image.Image]:
    """Grids of the clips at their first frame, at their second, ...; all clips move together.

    Raises:
        ValueError: no rows, or clips of unequal size or length.
    """
    if len({row.clips.shape[1:] for row in rows}) != 1:
        raise ValueError(f"a grid needs clips, all of one shape, got {[tuple(row.clips.shape) for row in rows]}")
    return [
        draw_grid([GridRow(_shrunk(row.clips[:, :, frame]), row.label, row.note) for row in rows], title, columns)
        for frame in range(rows[0].clips.shape[2])
    ]


def _shrunk(images: Tensor) -> Tensor:
    """(K, C, H, W) whose longer side is not too long to stand beside others."""
    longest = max(images.shape[-2:])
    if longest <= _MOST_SIDE:
        return images
    size = [max(1, round(side * _MOST_SIDE / longest)) for side in images.shape[-2:]]
    return nn_functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
