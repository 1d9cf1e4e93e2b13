"""A sheet shows the frames that it names; an animation shows every clip at the same time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flexidit.clip_pictures import ClipRow, ClipsRow, animated_grid, contact_sheet, even_frames


def shows(picture: Image.Image, image: Tensor) -> bool:
    """Whether a (1, H, W) image stands somewhere in the picture, enlarged to 64 pixels."""
    factor = -(-64 // min(image.shape[-2:]))
    levels = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy().repeat(factor, 0).repeat(factor, 1)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(picture)[:, :, 0], levels.shape)
    return bool((windows == levels).all(axis=(2, 3)).any())


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_frames_are_evenly_spaced_from_first_to_last() -> None:
    for num_frames in range(1, 30):
        for count in range(2, 10):
            chosen = even_frames(num_frames, count)
            assert len(chosen) == min(count, num_frames) == len(set(chosen))
            assert chosen[0] == 0 and chosen[-1] == num_frames - 1
            gaps = np.diff(chosen)
            assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_a_sheet_shows_the_chosen_frames_of_every_clip() -> None:
    clips = noise(2, 1, 9, 8, 8)
    sheet = contact_sheet([ClipRow(clip, "a clip") for clip in clips], "title", num_frames=3)
    for clip in clips:
        assert [shows(sheet, clip[:, frame]) for frame in range(9)] == [frame in (0, 4, 8) for frame in range(9)]


def test_an_animation_moves_all_clips_together() -> None:
    first, second = noise(2, 2, 1, 3, 8, 8)
    pictures = animated_grid([ClipsRow(first, "one"), ClipsRow(second, "other")], "title", ["a", "b"])
    assert len(pictures) == 3 and len({picture.size for picture in pictures}) == 1
    for frame, picture in enumerate(pictures):
        for clip in (*first, *second):
            assert [shows(picture, clip[:, other]) for other in range(3)] == [other == frame for other in range(3)]


def test_large_frames_are_made_smaller() -> None:
    sheet = contact_sheet([ClipRow(noise(3, 8, 384, 704), "a clip")])
    assert sheet.width < 2300 and sheet.height < 300


def test_clips_of_unequal_shape_are_refused() -> None:
    for shapes in ([], [(1, 4, 8, 8), (1, 5, 8, 8)]):
        with pytest.raises(ValueError, match="all of one shape"):
            contact_sheet([ClipRow(torch.zeros(shape), "") for shape in shapes])
    with pytest.raises(ValueError, match="all of one shape"):
        animated_grid([])
