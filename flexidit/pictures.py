"""Grids of images with a label beside each row, as one picture: samples at several budgets below one another.

Shape legend: K images of a row, C channels (1 or 3), H W height and width in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_INK, _FAINT, _PAPER = (32, 36, 44), (112, 118, 128), (255, 255, 255)
_GAP = 6  # between images
_MARGIN = 24  # around everything
_LARGE, _SMALL = 16, 13  # font sizes
_LINE = 16  # from one small line to the next


@dataclass(frozen=True)
class GridRow:
    """Images side by side, and what to write in front of them."""

    images: Tensor
    """(K, C, H, W) in [-1, 1]; values outside are clipped."""
    label: str
    note: str = ""
    """A second, fainter line."""


def draw_grid(rows: Sequence[GridRow], title: str = "", columns: Sequence[str] = (), min_side: int = 64) -> Image.Image:
    """One picture of all rows, images of all rows in line.

    Small images are enlarged by a whole factor without interpolation, so that each pixel stays a square and nothing is
    drawn that the model did not draw.

    Args:
        rows: Top to bottom.
        title: Written above.
        columns: Written above each column, such as class names or captions; long ones in several lines.
        min_side: Enlarge images until their shorter side has at least so many pixels.

    Raises:
        ValueError: no rows, or images of unequal size.
    """
    from PIL import Image, ImageDraw

    tiles = [[_enlarge(image, min_side) for image in row.images] for row in rows]
    sizes = {tile.size for row in tiles for tile in row}
    if len(sizes) != 1:
        raise ValueError(f"a grid needs images, all of one size, got {sorted(sizes) or 'none'}")
    width, height = sizes.pop()
    left = _MARGIN + _label_width(rows)
    headings = [_wrap(name, width + _GAP // 2) for name in columns]
    num_lines = max(map(len, headings), default=0)
    top = _MARGIN + (_LARGE + 16 if title else 0) + (num_lines * _LINE + 5 if num_lines else 0)
    right = left + max(map(len, tiles)) * (width + _GAP) - _GAP
    pitch = max(height, _LARGE + _SMALL + 8) + _GAP
    size = (max(right, _text_width(title)) + _MARGIN, top + len(rows) * pitch - _GAP + _MARGIN)
    picture = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(picture)
    if title:
        pen.text((_MARGIN, _MARGIN - 4), title, _INK, _font(_LARGE))
    for index, lines in enumerate(headings):
        for above, line in enumerate(reversed(lines)):
            place = (left + index * (width + _GAP) + width // 2, top - 6 - above * _LINE)
            pen.text(place, line, _FAINT, _font(_SMALL), anchor="ms")
    for index, (row, images) in enumerate(zip(rows, tiles, strict=True)):
        y = top + index * pitch
        _write_label(pen, row, y + height // 2)
        for column, image in enumerate(images):
            picture.paste(image, (left + column * (width + _GAP), y))
    return picture


def save_grid(
    rows: Sequence[GridRow],
    path: str | os.PathLike[str],
    title: str = "",
    columns: Sequence[str] = (),
    min_side: int = 64,
) -> Path:
    """Write :func:`draw_grid` as PNG, making the folder; returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(rows, title, columns, min_side).save(target)
    return target


def to_image(pixels: Tensor) -> Image.Image:
    """A picture of (C, H, W) pixels in [-1, 1], C being 1 or 3."""
    from PIL import Image

    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"an image has shape (1 or 3, H, W), got {tuple(pixels.shape)}")
    levels = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _enlarge(pixels: Tensor, min_side: int) -> Image.Image:
    from PIL import Image

    image = to_image(pixels)
    factor = max(1, -(-min_side // min(image.size)))  # rounded up
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _wrap(text: str, width: int) -> list[str]:
    """Lines no wider than so many pixels, unless a single word is."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(_SMALL).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _text_width(text: str, size: int = _LARGE) -> int:
    return int(_font(size).getlength(text)) + _MARGIN


def _label_width(rows: Sequence[GridRow]) -> int:
    return max(max(_text_width(row.label), _text_width(row.note, _SMALL)) for row in rows)


def _write_label(pen: Any, row: GridRow, middle: int) -> None:
    """Label and note, centred together on the row."""
    if not row.note:
        pen.text((_MARGIN, middle), row.label, _INK, _font(_LARGE), anchor="lm")
        return
    pen.text((_MARGIN, middle - 2), row.label, _INK, _font(_LARGE), anchor="ls")
    pen.text((_MARGIN, middle + 4), row.note, _FAINT, _font(_SMALL), anchor="la")
