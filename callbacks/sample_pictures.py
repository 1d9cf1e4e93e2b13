"""Samples of a model in training as pictures: a grid of images; of clips a contact sheet, and a grid that moves.

Shape legend: K samples of a row, C channels, F frames, H W height and width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flexidit.clip_files import encode_gif
from flexidit.clip_pictures import ClipRow, ClipsRow, animated_grid, contact_sheet
from flexidit.pictures import GridRow, draw_grid

_LABEL_WIDTH = 40  # characters beside a clip


@dataclass(frozen=True)
class SampleRow:
    """What was sampled under one schedule."""

    samples: Tensor
    """(K, C, H, W) or (K, C, F, H, W) in [-1, 1]."""
    label: str
    note: str


def picture_path(folder: Path, step: int) -> Path:
    """Example: ``step_00001000.png``."""
    return folder / f"step_{step:08d}.png"


def write_samples(
    rows: Sequence[SampleRow],
    columns: Sequence[str],
    title: str,
    step: int,
    folder: Path,
    boards: Sequence[Any],
    fps: float,
) -> None:
    """Write ``step_00001000.png``, of clips ``.gif`` beside it, and both to TensorBoard.

    Args:
        rows: top to bottom.
        columns: names of the K samples.
        title: written above.
        step: of the training.
        folder: for the files; made if need be.
        boards: TensorBoard writers.
        fps: frames per second of clips.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_clips = rows[0].samples.ndim == 5
    picture = _sheet(rows, columns, title) if is_clips else _grid(rows, columns, title)
    picture.save(path := picture_path(folder, step))
    for board in boards:
        board.add_image("samples", np.asarray(picture), step, dataformats="HWC")
    if is_clips:
        pictures = animated_grid([ClipsRow(row.samples, row.label, row.note) for row in rows], title, columns)
        gif = encode_gif(pictures, fps)
        path.with_suffix(".gif").write_bytes(gif)
        for board in boards:
            add_gif(board, "clips", gif, pictures[0].size, step)


def _grid(rows: Sequence[SampleRow], columns: Sequence[str], title: str) -> Any:
    return draw_grid([GridRow(row.samples, row.label, row.note) for row in rows], title, columns)


def _sheet(rows: Sequence[SampleRow], columns: Sequence[str], title: str) -> Any:
    """The clips of one column below one another, one for each budget."""
    names = [textwrap.shorten(name, _LABEL_WIDTH, placeholder=" ...") for name in columns]
    clips = [
        ClipRow(row.samples[place], name if budget == 0 else "", f"{row.label}: {row.note}")
        for place, name in enumerate(names)
        for budget, row in enumerate(rows)
    ]
    return contact_sheet(clips, title)


def add_gif(board: Any, tag: str, gif: bytes, size: tuple[int, int], step: int) -> None:
    """Log an animation among the images, where TensorBoard plays it.

    The writer's own ``add_video`` encodes the same gif, but with moviepy.

    Args:
        board: a ``torch.utils.tensorboard.SummaryWriter``.
        tag: name of the panel.
        gif: content of the file.
        size: width and height.
        step: of the training.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
