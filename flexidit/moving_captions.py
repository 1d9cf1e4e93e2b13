"""The words of moving digits: "a bold three moving right and up".

Such a caption is one of :mod:`flexidit.digit_captions` with a direction of movement after it. A slant is "forward", as
one writes, or "backward": in "a seven leaning right moving left", which word belongs to which verb only an encoder that
reads whole sentences would know. What a direction means in pixels stands in :mod:`flexidit.moving_digits`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flexidit.digit_captions import NUM_PHRASINGS, DigitAttributes, caption_of, parse_caption

DIRECTIONS: Mapping[str, tuple[int, int]] = {
    "right": (0, 1),
    "right and down": (1, 1),
    "down": (1, 0),
    "left and down": (1, -1),
    "left": (0, -1),
    "left and up": (-1, -1),
    "up": (-1, 0),
    "right and up": (-1, 1),
}
"""Direction -> signs of the movement (down, right), clockwise in steps of 45 degrees."""

_SLANTS = {"leaning left": "leaning backward", "leaning right": "leaning forward"}
_CLAUSES = {"leans left": "leans backward", "leans right": "leans forward"}
_NAMES = {signs: name for name, signs in DIRECTIONS.items()}
_SIGNS = {
    "left": (0, -1),
    "leftward": (0, -1),
    "leftwards": (0, -1),
    "right": (0, 1),
    "rightward": (0, 1),
    "rightwards": (0, 1),
    "up": (-1, 0),
    "upward": (-1, 0),
    "upwards": (-1, 0),
    "down": (1, 0),
    "downward": (1, 0),
    "downwards": (1, 0),
}
_MOVEMENT = re.compile(rf"\b(?:moving|moves|going|goes)\b((?:\W+(?:to|the|and|{'|'.join(_SIGNS)})\b)*)")


@dataclass(frozen=True)
class MovingDigit:
    """What a caption says.

    Raises:
        ValueError: for a direction that is not one of :data:`DIRECTIONS`.
    """

    digit: DigitAttributes
    direction: str

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"a direction is one of {', '.join(DIRECTIONS)}, got {self.direction!r}")


def moving_caption_of(moving: MovingDigit, phrasing: int = 0) -> str:
    """A caption in one of :data:`~flexidit.digit_captions.NUM_PHRASINGS` phrasings.

    :func:`parse_moving_caption` is the inverse of each.

    Example:
        >>> moving = MovingDigit(DigitAttributes(7, weight="bold", slant="right"), "up")
        >>> [moving_caption_of(moving, phrasing) for phrasing in range(NUM_PHRASINGS)]
        ['a bold seven leaning forward moving up', 'the digit seven, bold, leaning forward, moving up',
         'a handwritten bold seven that leans forward and moves up']
        >>> moving_caption_of(MovingDigit(DigitAttributes(3, weight="bold"), "right and up"))
        'a bold three moving right and up'
    """
    still = caption_of(moving.digit, phrasing)
    for word, other in (_SLANTS | _CLAUSES).items():
        still = still.replace(word, other)
    if phrasing == 2:
        return f"{still} {'that' if moving.digit.slant is None else 'and'} moves {moving.direction}"
    return f"{still}{',' if phrasing == 1 else ''} moving {moving.direction}"


def moving_captions_of(moving: MovingDigit) -> tuple[str, ...]:
    """All phrasings."""
    return tuple(moving_caption_of(moving, phrasing) for phrasing in range(NUM_PHRASINGS))


def parse_moving_caption(text: str) -> MovingDigit:
    """What a caption says, also one that a user typed.

    Example:
        >>> parse_moving_caption("Moving upwards and to the left: a thick 3")
        MovingDigit(digit=DigitAttributes(label=3, weight='bold', slant=None, size=None), direction='left and up')

    Raises:
        ValueError: for a caption without one direction, or whose rest is no caption of a digit.
    """
    movements = list(_MOVEMENT.finditer(text.lower()))
    if len(movements) != 1:
        raise ValueError(f"a caption names one movement, such as 'a bold three moving right and up', got {text!r}")
    start, end = movements[0].span()
    return MovingDigit(parse_caption(f"{text[:start]} {text[end:]}"), _direction(text, movements[0][1]))


def _direction(text: str, words: str) -> str:
    signs = {_SIGNS[word] for word in re.findall(r"\w+", words) if word in _SIGNS}
    name = _NAMES.get((sum(down for down, _ in signs), sum(right for _, right in signs)))
    if name is None or len(signs) > 2 or len(signs) != len(name.split(" and ")):
        raise ValueError(f"{text!r} does not say where it moves: one of {', '.join(DIRECTIONS)}")
    return name
