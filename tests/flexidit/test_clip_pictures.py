"""Frames arrive unchanged on a sheet, in order, and clips that stand beside one another move together."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from flexidit.clip_pictures import MOST_FRAMES, ClipRow, ClipsRow, animated_grid, contact_sheet, even_frames
from flexidit.pictures import GridRow, draw_grid, to_image


def clips(count=2, channels=3, num_frames=20, size=(70, 90)):
    """(K, C, F, H, W); large enough to be shown as they are."""
    return torch.rand(count, channels, num_frames, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def place(picture, image):
    """(row, column) of the one exact copy of an image in a picture."""
    array, tile = np.asarray(picture), np.asarray(to_image(image))
    corners = (array[: 1 - tile.shape[0], : 1 - tile.shape[1]] == tile[0, 0]).all(2)
    found = [
        (int(y), int(x))
        for y, x in np.argwhere(corners)
        if (array[y : y + tile.shape[0], x : x + tile.shape[1]] == tile).all()
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("num_frames", range(1, 30))
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_chosen_frames_are_the_first_the_last_and_evenly_between(num_frames, count):
    chosen = even_frames(num_frames, count)
    assert len(chosen) == min(count, num_frames)
    assert chosen[0] == 0
    assert chosen[-1] == num_frames - 1 or count == 1
    steps = np.diff(chosen)
    assert not len(steps) or 1 <= steps.min() <= steps.max() <= steps.min() + 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_frames_from_left_to_right_and_clips_below_one_another(channels):
    x = clips(channels=channels)
    sheet = contact_sheet([ClipRow(x[0], "first", "a note"), ClipRow(x[1], "second")], "title")
    places = [[place(sheet, clip[:, frame]) for frame in even_frames(20)] for clip in x]
    assert len(places[0]) == MOST_FRAMES
    for row in places:
        assert len({y for y, _ in row}) == 1
        assert [column for _, column in row] == sorted(column for _, column in row)
    assert [column for _, column in places[0]] == [column for _, column in places[1]]
    assert places[1][0][0] >= places[0][0][0] + 70


def test_a_sheet_says_which_frames_it_shows():
    x = clips(1, num_frames=9)
    row = GridRow(x[0][:, even_frames(9, 3)].transpose(0, 1), "label")
    drawn = draw_grid([row], "title", ["frame 0", "frame 4", "frame 8"])
    assert np.array_equal(drawn, contact_sheet([ClipRow(x[0], "label")], "title", 3))


@pytest.mark.parametrize("size", [(448, 224), (224, 448), (500, 900)])
def test_large_frames_are_made_smaller_in_proportion(size):
    """To 224 pixels at most; the gaps between them stay."""
    flat = torch.linspace(-0.9, 0.9, 8).view(1, 8, 1, 1).expand(3, 8, *size)
    sheet = contact_sheet([ClipRow(flat, "")])
    short = round(224 * min(size) / max(size))
    shown = (short, 224) if size[1] > size[0] else (224, short)
    places = [place(sheet, flat[:, frame, : shown[0], : shown[1]]) for frame in range(8)]
    assert {after[1] - before[1] - shown[1] for before, after in pairwise(places)} == {6}


def test_clips_of_a_moving_grid_move_together():
    x = clips(4, num_frames=3)
    frames = animated_grid([ClipsRow(x[:2], "a"), ClipsRow(x[2:], "b")], "title", ["left", "right"])
    assert len(frames) == 3
    assert len({frame.size for frame in frames}) == 1
    where = [[place(frame, clip[:, number]) for clip in x] for number, frame in enumerate(frames)]
    assert where[0] == where[1] == where[2]


@pytest.mark.parametrize("draw", [contact_sheet, animated_grid])
def test_clips_that_do_not_match_are_refused(draw):
    make = (lambda clip: ClipRow(clip, "")) if draw is contact_sheet else (lambda clip: ClipsRow(clip[None], ""))
    short, long = clips(1, num_frames=3)[0], clips(1, num_frames=4)[0]
    with pytest.raises(ValueError, match="needs clips, all of one shape, got .*3, 3, .*3, 4, "):
        draw([make(short), make(long)])
    with pytest.raises(ValueError, match=r"needs clips, all of one shape, got \[\]"):
        draw([])
