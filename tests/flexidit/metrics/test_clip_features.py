"""Frames pooled do not know their order, clips do; all coefficients are all frames, turned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flexidit.draws import Draw
from flexidit.metrics.clip_features import ClipFeatures, FrameFeatures, cosine_matrix
from flexidit.metrics.features import FeatureExtractor
from flexidit.metrics.frechet import FeatureStatistics
from flexidit.moving_digits import MovingDigits


class Projection(nn.Module):
    """A fixed random projection of images of 16x16 pixels to four features, with a bend in it."""

    name = "random projection"
    fingerprint = "projection/0"

    def __init__(self) -> None:
        super().__init__()
        matrix = torch.randn(256, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("matrix", matrix)

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.ndim == 4 and len(pixels) <= 50
        return (pixels.double().flatten(1) @ self.get_buffer("matrix") / 4).tanh()


@pytest.fixture(scope="module")
def real() -> Callable[[int], Tensor]:
    """Clips of 400 digits in one epoch's motion."""
    digits = MovingDigits()
    return lambda epoch: digits.clips(0, [Draw(sample, epoch) for sample in range(400)])[0]


def distance(features: FeatureExtractor, x: Tensor, y: Tensor) -> float:
    ours, theirs = (FeatureStatistics.of(features(clips)).gaussian() for clips in (x, y))
    return ours.distance(theirs)


def shuffled(clips: Tensor) -> Tensor:
    """Each clip's frames in an order of its own."""
    return torch.stack([clip[:, torch.randperm(clip.shape[1])] for clip in clips])


def test_frames_are_samples_of_their_own(real: Callable[[int], Tensor]) -> None:
    x, extractor = real(0)[:13], Projection()
    expected = torch.cat([extractor(clip.transpose(0, 1)) for clip in x])
    assert FrameFeatures(extractor, batch_size=50)(x).equal(expected)


def test_the_transform_is_a_rotation_whose_first_row_is_the_mean() -> None:
    for num_frames in (1, 2, 5, 8):
        matrix = cosine_matrix(num_frames)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(num_frames, dtype=torch.float64))
        torch.testing.assert_close(matrix[0], torch.full((num_frames,), num_frames**-0.5, dtype=torch.float64))
    drift = cosine_matrix(8)[1]
    assert (drift.diff() < 0).all()


def test_the_transform_is_scipys() -> None:
    from scipy.fft import dct

    x = torch.randn(8, dtype=torch.float64)
    expected = torch.from_numpy(dct(x.numpy(), norm="ortho"))
    torch.testing.assert_close(cosine_matrix(8) @ x, expected)


def test_all_coefficients_are_as_far_apart_as_all_frames(real: Callable[[int], Tensor]) -> None:
    class AllFrames(FrameFeatures):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels).view(len(pixels), -1)

    x, y = real(0), shuffled(real(1))
    whole = distance(ClipFeatures(Projection(), 8, batch_size=50), x, y)
    assert whole == pytest.approx(distance(AllFrames(Projection(), batch_size=50), x, y), rel=1e-6)


@pytest.mark.parametrize("num_coefficients", [2, 3, 8])
def test_the_order_of_frames_moves_clips_and_not_frames(real: Callable[[int], Tensor], num_coefficients: int) -> None:
    torch.manual_seed(0)
    frames, clips = FrameFeatures(Projection(), 50), ClipFeatures(Projection(), num_coefficients, batch_size=50)
    x, y = real(0), real(1)
    assert distance(frames, x, shuffled(y)) == pytest.approx(distance(frames, x, y), abs=1e-9)
    assert distance(clips, x, shuffled(y)) > 3 * distance(clips, x, y)
    still = y[:, :, :1].expand_as(y)
    assert distance(clips, x, still) > 10 * distance(clips, x, y)


def test_the_mean_over_frames_is_blind_to_their_order(real: Callable[[int], Tensor]) -> None:
    mean, x = ClipFeatures(Projection(), 1, batch_size=50), real(0)
    assert distance(mean, x, shuffled(x)) == pytest.approx(0, abs=1e-9)


def test_statistics_of_frames_and_of_clips_are_told_apart() -> None:
    extractors = [FrameFeatures(Projection()), ClipFeatures(Projection()), ClipFeatures(Projection(), 2)]
    assert len({features.fingerprint for features in extractors}) == 3
    assert all(
        isinstance(features, FeatureExtractor) and "random projection" in features.name for features in extractors
    )


def test_what_is_no_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clips of shape \(N, C, F, H, W\) are needed, got \(2, 1, 16, 16\)"):
        ClipFeatures(Projection())(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="3 temporal coefficients need as many frames"):
        ClipFeatures(Projection())(torch.zeros(2, 1, 2, 16, 16))
    with pytest.raises(ValueError, match="num_coefficients 0"):
        ClipFeatures(Projection(), 0)
