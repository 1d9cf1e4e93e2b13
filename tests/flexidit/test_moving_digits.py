"""Clips are what they are said to be: pure, of constant ink and velocity, in the named direction, inside the canvas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flexidit.digit_images import load_digit_images
from flexidit.draws import Draw
from flexidit.moving_captions import DIRECTIONS
from flexidit.moving_digits import DIRECTION_NAMES, SHARES, ClipFormat, Motions, MovingDigits, draw_motions, positions

FORMATS = [ClipFormat(), ClipFormat(24, 5, 11), ClipFormat(12, 3, 8)]
DRAWS = [Draw(sample, epoch) for sample in range(0, 1797, 9) for epoch in range(3)]


def mass_and_centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of all ink: (N, F) and (N, F, 2)."""
    ink = (x[:, 0].double() + 1) / 2
    mass, place = ink.sum((2, 3)), torch.arange(x.shape[-1], dtype=torch.float64)
    centre = torch.stack([(ink.sum(3) * place).sum(2), (ink.sum(2) * place).sum(2)], dim=2)
    return mass, centre / mass[..., None]


def motions_of(starts: list[list[float]], velocities: list[list[float]]) -> Motions:
    zeros = np.zeros(len(starts), dtype=np.int64)
    return Motions(zeros, zeros, np.array(starts), np.array(velocities))


def test_a_clip_is_a_pure_function_of_seed_epoch_and_digit() -> None:
    digits = MovingDigits()
    x, _ = digits.clips(3, DRAWS[:20])
    assert digits.clips(3, DRAWS[7:8])[0].equal(x[7:8])
    assert digits.clips(3, DRAWS[:20][::-1])[0].flip(0).equal(x)
    for seed, draw in ((4, DRAWS[7]), (3, Draw(DRAWS[7].sample, 9))):
        assert not digits.clips(seed, [draw])[0].equal(x[7:8])


@pytest.mark.parametrize("clip", FORMATS)
def test_the_first_frame_is_the_image_of_the_data_set(clip: ClipFormat) -> None:
    digits = MovingDigits(clip)
    x, motions = digits.clips(0, DRAWS[:50])
    assert x.shape == (50, *clip.shape) and x.dtype == torch.float32
    images, _ = load_digit_images(clip.digit_size)
    for frame, (down, right), draw in zip(x[:, 0, 0], motions.starts.astype(int), DRAWS, strict=False):
        expected = torch.full((clip.canvas_size, clip.canvas_size), -1.0)
        expected[down : down + clip.digit_size, right : right + clip.digit_size] = images[draw.sample, 0]
        torch.testing.assert_close(frame, expected)


@pytest.mark.parametrize("clip", FORMATS)
def test_ink_is_constant_and_its_centre_moves_as_the_digit_does(clip: ClipFormat) -> None:
    x, motions = MovingDigits(clip).clips(0, DRAWS)
    mass, centre = mass_and_centre(x)
    torch.testing.assert_close(mass, mass[:, :1].expand_as(mass), rtol=1e-4, atol=0)
    places = torch.from_numpy(positions(motions, clip))
    torch.testing.assert_close(centre - centre[:, :1], places - places[:, :1], rtol=0, atol=1e-3)
    assert x.min() >= -1 and x.max() <= 1 + 1e-5


@pytest.mark.parametrize("clip", FORMATS)
def test_digits_keep_to_the_named_direction_up_to_the_last_named_frame(clip: ClipFormat) -> None:
    motions = draw_motions(1, DRAWS, clip)
    last = clip.last_named_frame
    way = positions(motions, clip)[:, : last + 1] - motions.starts[:, None]  # (N, last + 1, 2)
    signs = np.array([DIRECTIONS[DIRECTION_NAMES[direction]] for direction in motions.directions])
    share = way[:, -1] / clip.free
    assert (np.sign(share) == signs).all()
    moved = np.abs(share)[signs != 0]
    assert SHARES[0] <= moved.min() + 1e-9 and moved.max() <= SHARES[1] + 1e-9
    np.testing.assert_allclose(way, way[:, -1:] * np.arange(last + 1)[:, None] / last, atol=1e-9)
    diagonal = np.abs(share)[(signs != 0).all(1)]
    np.testing.assert_allclose(diagonal[:, 0], diagonal[:, 1])


def test_digits_bounce_off_the_borders() -> None:
    clip = ClipFormat(12, 8, 8)  # four pixels to move
    places = positions(motions_of([[0.0, 3.0], [1.0, 4.0]], [[1.5, 0.0], [-1.0, 0.5]]), clip)
    assert places[0, :, 0].tolist() == [0, 1.5, 3, 3.5, 2, 0.5, 1, 2.5]
    assert places[0, :, 1].tolist() == [3] * 8
    assert places[1, :, 0].tolist() == [1, 0, 1, 2, 3, 4, 3, 2]
    assert places[1, :, 1].tolist() == [4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5]


def test_movements_are_evenly_spread_and_often_bounce() -> None:
    clip = ClipFormat()
    draws = [Draw(sample) for sample in range(1797)]
    motions = draw_motions(0, draws, clip)
    for values, count in ((motions.directions, 8), (motions.phrasings, 3)):
        shares = np.bincount(values, minlength=count) / len(draws)
        assert shares == pytest.approx(np.full(count, 1 / count), abs=0.03)
    straight = motions.starts[:, None] + motions.velocities[:, None] * np.arange(clip.num_frames)[:, None]
    bounces = (np.abs(straight - positions(motions, clip)) > 1e-9).any((1, 2)).mean()
    assert 0.5 < bounces < 0.95
    assert {tuple(start) for start in motions.starts} == {(down, right) for down in range(9) for right in range(9)}


@pytest.mark.parametrize(
    "sizes, message",
    [((16, 8, 7), "8 pixels a side"), ((11, 8, 8), "half as many more"), ((16, 2, 8), "3 frames or more")],
)
def test_formats_without_room_or_time_to_move_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipFormat(*sizes)
