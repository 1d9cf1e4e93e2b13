"""scikit-learn's real digits, moving across a square canvas and bouncing off its borders: clips without a download.

A digit moves with a constant velocity in one of eight directions and is reflected at the borders, so over a whole clip
its direction is ambiguous. What a caption names is therefore where the digit *sets off* to, and its start is drawn such
that it reaches no border before the middle of the clip: up to frame :meth:`ClipFormat.last_named_frame` its centroid
moves on a straight line in the named direction, by 40 to 70 % of the free way. After that it may bounce, or not.

The digit starts on the pixel grid, so that the first frame is the image of the data set, and is placed bilinearly
between the pixels from then on: its ink and the velocity of its centroid are exactly constant.

Shape legend: N clips, F frames, S side of the canvas and D side of the digit in pixels. Axes are (down, right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flexidit.digit_captions import NUM_PHRASINGS
from flexidit.digit_images import NATIVE_SIZE, load_digit_images
from flexidit.draws import Draw, draw_uniform
from flexidit.moving_captions import DIRECTIONS

Array: TypeAlias = "np.ndarray[Any, Any]"

SHARES = (0.4, 0.7)
"""Of the free way: how much of it a digit crosses on each axis that it moves along, up to the last named frame."""
DIRECTION_NAMES = tuple(DIRECTIONS)
"""Places in here are what is drawn."""
_SIGNS = np.array(list(DIRECTIONS.values()))  # (8, 2)


@dataclass(frozen=True)
class ClipFormat:
    """Size of the clips.

    Raises:
        ValueError: the digit is below 8 pixels or has no room to move, or there are fewer than three frames.
    """

    canvas_size: int = 16
    """S."""
    num_frames: int = 8
    """F."""
    digit_size: int = NATIVE_SIZE
    """D; 8 is native, more is upsampled bilinearly."""

    def __post_init__(self) -> None:
        if self.digit_size < NATIVE_SIZE or 2 * self.canvas_size < 3 * self.digit_size:
            raise ValueError(
                f"a digit has {NATIVE_SIZE} pixels a side or more, and a canvas half as many more than its digit, to "
                f"move in: got digit_size {self.digit_size} and canvas_size {self.canvas_size}"
            )
        if self.num_frames < 3:
            raise ValueError(f"a movement that may bounce needs 3 frames or more, got num_frames {self.num_frames}")

    @property
    def free(self) -> int:
        """Pixels that a digit can move along each axis."""
        return self.canvas_size - self.digit_size

    @property
    def last_named_frame(self) -> int:
        """Up to here, counted from 0, the digit keeps to the direction that its caption names."""
        return self.num_frames // 2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(1, F, S, S) of a clip."""
        return 1, self.num_frames, self.canvas_size, self.canvas_size


SMALL = ClipFormat()
"""The default: 8 frames of 16x16 pixels."""


class Motions(NamedTuple):
    """How N digits move, and how their captions are phrased."""

    directions: Array
    """(N,) places in :data:`DIRECTION_NAMES`."""
    phrasings: Array
    """(N,) below :data:`~flexidit.digit_captions.NUM_PHRASINGS`."""
    starts: Array
    """(N, 2) whole pixels, of the top left corner of the digit."""
    velocities: Array
    """(N, 2) pixels a frame."""


def draw_motions(seed: int, draws: Sequence[Draw], clip: ClipFormat) -> Motions:
    """Motions of these samples in these epochs: each a pure function of its draw, whatever the others are."""
    numbers = np.stack([draw_uniform(seed, draw, 5) for draw in draws])  # (N, 5)
    directions = (numbers[:, 0] * len(DIRECTIONS)).astype(np.int64)
    phrasings = (numbers[:, 1] * NUM_PHRASINGS).astype(np.int64)
    low, high = SHARES
    way = (low + (high - low) * numbers[:, 2:3]) * clip.free * _SIGNS[directions]  # (N, 2) to the last named frame
    room = np.floor(clip.free - np.abs(way)) + 1  # (N, 2) whole pixels from which no border is crossed on the way
    starts = np.floor(numbers[:, 3:5] * room) - np.floor(np.minimum(way, 0))
    return Motions(directions, phrasings, starts, way / clip.last_named_frame)


def positions(motions: Motions, clip: ClipFormat) -> Array:
    """Top left corners of the digits: (N, F, 2), between 0 and the free way."""
    frames = np.arange(clip.num_frames)[:, None]
    straight = motions.starts[:, None] + motions.velocities[:, None] * frames  # (N, F, 2)
    return clip.free - np.abs(straight % (2 * clip.free) - clip.free)  # there and back again


class MovingDigits:
    """All 1,797 digits, to be set in motion.

    Args:
        clip: Size of the clips.
    """

    def __init__(self, clip: ClipFormat = SMALL) -> None:
        self.clip = clip
        self.images, self.labels = load_digit_images(clip.digit_size)
        self._ink = (self.images.numpy()[:, 0] + 1) / 2  # (1797, D, D)

    def __len__(self) -> int:
        return len(self.labels)

    def render(self, samples: Sequence[int], motions: Motions) -> Tensor:
        """Clips of N digits, given by their places in the data set: (N, 1, F, S, S) float32 in [-1, 1].

        All in NumPy, on this thread: torch would wake its thread pool, which stalls where cores are oversubscribed.
        """
        places: Array = positions(motions, self.clip).astype(np.float32)
        down, right = (_placement(places[:, :, axis], self.clip) for axis in range(2))  # (N, F, S, D)
        ink = down @ self._ink[list(samples), None] @ right.swapaxes(2, 3)  # (N, F, S, S)
        ink *= 2
        ink -= 1
        return torch.from_numpy(ink[:, None])

    def clips(self, seed: int, draws: Sequence[Draw]) -> tuple[Tensor, Motions]:
        """Clips (N, 1, F, S, S) of these samples in these epochs, and how they move."""
        motions = draw_motions(seed, draws, self.clip)
        return self.render([draw.sample for draw in draws], motions), motions


def _placement(places: Array, clip: ClipFormat) -> Array:
    """Bilinear placement along one axis: (N, F) first pixels -> matrices (N, F, S, D)."""
    offsets = np.arange(clip.canvas_size, dtype=np.float32)[:, None] - np.arange(clip.digit_size, dtype=np.float32)
    return np.maximum(1 - np.abs(offsets - places[:, :, None, None]), 0)
