"""The patch size: the one quantity that a flexible transformer changes between calls.

A patch covers ``t`` latent frames, ``h`` rows and ``w`` columns; images have ``t = 1``. Larger patches mean
fewer tokens, hence a cheaper and *weaker* prediction; smaller ones are more *powerful* (paper, section 3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import total_ordering
from typing import TypeAlias

_FORM = "an int such as 4, a string such as '4' or '1x4x4', or a tuple of two or three ints"


@total_ordering
@dataclass(frozen=True)
class PatchSize:
    """Extent of one patch in latent frames, rows and columns.

    Sizes are ordered by the number of latent positions a patch covers: ``a < b`` says that ``a`` is the more
    powerful one, as in the paper's guidance rule p_cond < p_uncond (section 3.4).

    Example:
        >>> PatchSize.parse("4")
        PatchSize(t=1, h=4, w=4)
        >>> PatchSize.parse(2) < PatchSize.parse("1x4x4")
        True
        >>> PatchSize.parse(4).num_tokens((32, 32)), PatchSize.parse(4).num_tokens((30, 32))
        (64, 64)
    """

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.as_tuple()):
            raise ValueError(f"a patch covers at least one position along each axis, got {self.as_tuple()}")

    @classmethod
    def parse(cls, value: PatchSizeLike) -> PatchSize:
        """Read a patch size as users write it: ``2``, ``"2"``, ``"1x4x4"``, ``(4, 4)`` or ``(1, 4, 4)``.

        Raises:
            ValueError: the value has none of these forms.
        """
        if isinstance(value, PatchSize):
            return value
        sides = _sides(value)
        if len(sides) == 1:
            return cls(1, sides[0], sides[0])
        if len(sides) == 2:
            return cls(1, sides[0], sides[1])
        if len(sides) == 3:
            return cls(*sides)
        raise ValueError(f"{value!r} is not a patch size; give {_FORM}")

    @property
    def name(self) -> str:
        """Its written form, which also names its adapter and its logged keys: ``"1x4x4"``."""
        return f"{self.t}x{self.h}x{self.w}"

    @property
    def volume(self) -> int:
        """Number of latent positions under one patch."""
        return self.t * self.h * self.w

    def as_tuple(self) -> tuple[int, int, int]:
        """``(t, h, w)``."""
        return (self.t, self.h, self.w)

    def grid(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Patches along each axis of an ``(H, W)`` or ``(F, H, W)`` latent, the last one padded if need be."""
        frames, height, width = as_volume(size)
        return (math.ceil(frames / self.t), math.ceil(height / self.h), math.ceil(width / self.w))

    def num_tokens(self, size: Sequence[int]) -> int:
        """Sequence length for a latent of ``(H, W)`` or ``(F, H, W)``."""
        return math.prod(self.grid(size))

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, PatchSize):
            return NotImplemented
        return (self.volume, *self.as_tuple()) < (other.volume, *other.as_tuple())

    def __str__(self) -> str:
        return self.name


PatchSizeLike: TypeAlias = "int | str | Sequence[int] | PatchSize"


def as_volume(size: Sequence[int]) -> tuple[int, int, int]:
    """``(H, W)`` or ``(F, H, W)`` as ``(F, H, W)``; an image is a clip of one frame."""
    if len(size) == 2:
        return (1, size[0], size[1])
    if len(size) == 3:
        return (size[0], size[1], size[2])
    raise ValueError(f"a latent size is (H, W) or (F, H, W), got {tuple(size)}")


def _sides(value: object) -> tuple[int, ...]:
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a patch size; give {_FORM}")
    if isinstance(value, int):
        return (value,)
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\s*x\s*\d+){0,2}\s*", value):
        return tuple(int(side) for side in value.split("x"))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    raise ValueError(f"{value!r} is not a patch size; give {_FORM}")
