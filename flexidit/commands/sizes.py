"""Latent sizes as users write them; no torch."""

from __future__ import annotations


def parse_size(text: str, num_axes: int, option: str = "--size") -> tuple[int, ...]:
    """``"32x64"`` or ``"32"`` of images (two axes), ``"21x60x104"`` of clips (three).

    Raises:
        ValueError: the text is something else.

    Example:
        >>> parse_size("32", 2), parse_size("21x60x104", 3)
        ((32, 32), (21, 60, 104))
    """
    try:
        sides = [int(side) for side in text.split("x")]
    except ValueError:
        sides = []
    if len(sides) == 1 and num_axes == 2:
        sides *= 2
    if len(sides) != num_axes or min(sides) < 1:
        form = "FxHxW, such as 21x60x104" if num_axes == 3 else "32 or 32x64"
        raise ValueError(f"{option} {text!r} is not a latent size of this model; give {form}")
    return tuple(sides)
