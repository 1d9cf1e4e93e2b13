"""The words of digit captions: "an upright bold zero", "the digit three, thin, leaning left".

A caption names the class, and of stroke weight, slant and size what is remarkable; about the rest it is silent. What
the words mean in pixels is measured in :mod:`flexidit.metrics.digit_attributes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CLASS_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "weight": ("thin", "bold"),
    "slant": ("left", "upright", "right"),
    "size": ("narrow", "wide"),
}
"""Values an attribute can have in a caption. All digits are equally high, so a large one is a wide one."""

_SYNONYMS = {
    "light": "thin",
    "thick": "bold",
    "heavy": "bold",
    "straight": "upright",
    "forward": "right",  # as one writes
    "backward": "left",
    "small": "narrow",
    "large": "wide",
    "big": "wide",
    "broad": "wide",
}
_FILLERS = ("a", "an", "and", "the", "digit", "number", "handwritten", "that", "is", "leaning", "leans", "to")
_ATTRIBUTE_OF = {value: name for name, values in ATTRIBUTES.items() for value in values}
NUM_PHRASINGS = 3


@dataclass(frozen=True)
class DigitAttributes:
    """What a caption says; None is silence.

    Raises:
        ValueError: for a label outside 0 to 9 or an unknown value.
    """

    label: int
    """The class, 0 to 9."""
    weight: str | None = None
    """Of the strokes: "thin" or "bold"."""
    slant: str | None = None
    """"left", "upright" or "right"."""
    size: str | None = None
    """"narrow" or "wide"."""

    def __post_init__(self) -> None:
        if not 0 <= self.label < len(CLASS_WORDS):
            raise ValueError(f"a digit is 0 to 9, got {self.label}")
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in (None, *values):
                raise ValueError(f"{name} is one of {', '.join(values)}, or None, got {getattr(self, name)!r}")

    @property
    def named(self) -> dict[str, str]:
        """Attribute -> value, of those that the caption names."""
        return {name: getattr(self, name) for name in ATTRIBUTES if getattr(self, name) is not None}


def caption_of(digit: DigitAttributes, phrasing: int = 0) -> str:
    """A caption in one of :data:`NUM_PHRASINGS` phrasings; :func:`parse_caption` is the inverse of each.

    Example:
        >>> digit = DigitAttributes(7, weight="bold", slant="right")
        >>> [caption_of(digit, phrasing) for phrasing in range(NUM_PHRASINGS)]
        ['a bold seven leaning right', 'the digit seven, bold, leaning right',
         'a handwritten bold seven that leans right']
        >>> caption_of(DigitAttributes(0, weight="thin", slant="upright", size="wide"))
        'an upright thin wide zero'
    """
    return (_plain, _listed, _clause)[phrasing](CLASS_WORDS[digit.label], _adjectives(digit), digit.slant)


def captions_of(digit: DigitAttributes) -> tuple[str, ...]:
    """All phrasings."""
    return tuple(caption_of(digit, phrasing) for phrasing in range(NUM_PHRASINGS))


def parse_caption(text: str) -> DigitAttributes:
    """What a caption says, also one that a user typed: any order, numerals, a few synonyms.

    Example:
        >>> parse_caption("A large, heavy 7 leaning to the right")
        DigitAttributes(label=7, weight='bold', slant='right', size='wide')

    Raises:
        ValueError: for an unknown word, no digit or two, or words that contradict each other.
    """
    labels, values = set[int](), set[str]()
    for word in re.findall(r"\w+", text.lower()):
        value = _SYNONYMS.get(word, word)
        if value in CLASS_WORDS:
            labels.add(CLASS_WORDS.index(value))
        elif re.fullmatch("[0-9]", value):
            labels.add(int(value))
        elif value in _ATTRIBUTE_OF:
            values.add(value)
        elif value not in _FILLERS:
            raise ValueError(f"{word!r} in {text!r} is not a word of digit captions: they know {_vocabulary()}")
    if len(labels) != 1:
        raise ValueError(f"a digit caption names one digit, such as 'a bold seven leaning right', got {text!r}")
    return DigitAttributes(labels.pop(), **{name: _only(text, name, values) for name in ATTRIBUTES})


def _adjectives(digit: DigitAttributes) -> list[str]:
    return [value for value in (digit.weight, digit.size) if value is not None]


def _plain(word: str, adjectives: Sequence[str], slant: str | None) -> str:
    upright = ["upright"] if slant == "upright" else []
    leaning = ["leaning", slant] if slant in ("left", "right") else []
    return _with_article([*upright, *adjectives, word, *leaning])


def _listed(word: str, adjectives: Sequence[str], slant: str | None) -> str:
    leaning = [] if slant is None else [slant if slant == "upright" else f"leaning {slant}"]
    return ", ".join([f"the digit {word}", *adjectives, *leaning])


def _clause(word: str, adjectives: Sequence[str], slant: str | None) -> str:
    clause = [] if slant is None else ["that", "is" if slant == "upright" else "leans", slant]
    return _with_article(["handwritten", *" and ".join(adjectives).split(), word, *clause])


def _with_article(words: Sequence[str]) -> str:
    return " ".join(["an" if words[0][0] in "aeiu" else "a", *words])  # "a one" has a consonant's sound


def _only(text: str, name: str, values: set[str]) -> str | None:
    found = [value for value in ATTRIBUTES[name] if value in values]
    if len(found) > 1:
        raise ValueError(f"{text!r} says both {' and '.join(found)}: name one {name}")
    return found[0] if found else None


def _vocabulary() -> str:
    known = [*CLASS_WORDS, *_ATTRIBUTE_OF, *_SYNONYMS]
    return f"{', '.join(known)}, numerals, and fillers such as {', '.join(_FILLERS[:4])}"
