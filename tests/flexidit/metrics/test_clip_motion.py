"""VBench's published loops, one frame after the other, give the same numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from flexidit.draws import Draw
from flexidit.metrics.clip_motion import average, motion_smoothness, temporal_flicker
from flexidit.metrics.features import to_byte_levels
from flexidit.moving_digits import MovingDigits


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return MovingDigits().clips(0, [Draw(sample) for sample in range(20)])[0]


def saved_frames(clip: Tensor) -> list[np.ndarray]:
    """As read back from a file: F arrays (H, W, C) of bytes."""
    return [frame.permute(1, 2, 0).numpy().astype(np.uint8) for frame in to_byte_levels(clip).unbind(1)]


def mean_absolute_error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean(np.abs(one.astype(np.float64) - other.astype(np.float64))))


def published_flickering(frames: list[np.ndarray]) -> float:
    errors = [mean_absolute_error(frames[i], frames[i + 1]) for i in range(len(frames) - 1)]
    return (255.0 - float(np.mean(errors))) / 255.0


def published_smoothness(frames: list[np.ndarray]) -> float:
    """With the average in the network's place: fill in between every other frame, compare what was left out."""
    inputs = frames[0::2]
    outputs = [inputs[0]]
    for before, after in pairwise(inputs):
        outputs += [((before.astype(np.float64) + after) / 2).astype(np.uint8), after]
    left_out, filled_in = frames[1::2], outputs[1::2]
    errors = [mean_absolute_error(left_out[i], filled_in[i]) for i in range(len(filled_in))]
    return (255.0 - float(np.mean(errors))) / 255.0


@pytest.mark.parametrize("num_frames", [3, 4, 7, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_numbers_are_those_of_the_published_definitions(clips: Tensor, num_frames: int, channels: int) -> None:
    x = clips[:, :, :num_frames] + 0.05 * torch.randn(20, channels, num_frames, 16, 16)
    frames = [saved_frames(clip) for clip in x]
    assert temporal_flicker(x).tolist() == pytest.approx([published_flickering(f) for f in frames], abs=1e-6)
    assert motion_smoothness(x).tolist() == pytest.approx([published_smoothness(f) for f in frames], abs=1e-6)


def test_what_stands_still_does_not_flicker(clips: Tensor) -> None:
    still = clips[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert temporal_flicker(still).eq(1).all() and motion_smoothness(still).eq(1).all()


def test_order_and_jitter_cost_smoothness(clips: Tensor) -> None:
    shuffled = clips[:, :, torch.tensor([0, 5, 2, 7, 1, 6, 3, 4])]
    for measure in (temporal_flicker, motion_smoothness):
        real = measure(clips).mean()
        assert measure(shuffled).mean() < real - 0.01
        assert measure((clips + 0.2 * torch.randn(clips.shape)).clamp(-1, 1)).mean() < real - 0.02
        assert measure(clips[:, :, ::2]).mean() < real - 0.01  # twice as fast


def test_a_better_interpolator_scores_higher(clips: Tensor) -> None:
    """One that knows the answer: 1 for an even number of pairs, whatever the motion."""
    levels = to_byte_levels(clips[:, :, :7])

    def oracle(before: Tensor, after: Tensor) -> Tensor:
        assert before.shape == after.shape == (60, 1, 16, 16)
        return levels[:, :, 1::2].transpose(1, 2).flatten(0, 1)

    assert motion_smoothness(clips[:, :, :7], oracle).eq(1).all()
    assert motion_smoothness(clips[:, :, :7], average).mean() < 0.99


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 1, 16, 16)])
def test_what_is_no_clip_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="with 2 frames or more are needed, got"):
        temporal_flicker(torch.zeros(shape))
    with pytest.raises(ValueError, match="with 3 frames or more are needed, got"):
        motion_smoothness(torch.zeros(shape))
