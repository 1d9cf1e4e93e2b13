"""Features of clips out of a network for images, for Frechet distances per frame and over whole clips.

Per frame, all frames of all clips are samples of one set: what single frames look like counts, their order does not.
Over clips, each clip is one vector of temporal cosine coefficients of its frames' features: the first is their mean,
the second their drift from begin to end, and so on. Frames in another order, a movement that stops or jumps, keep the
frame distance and change the clip distance. With as many coefficients as frames that distance equals the one of all
frames' features behind one another, because the transform is a rotation and the Frechet distance does not see those;
with fewer it is that of their slowest changes, and a covariance of K * D features needs fewer clips.

Where there is a network for clips, such as I3D of the FVD, it is an extractor by itself: it takes (N, C, F, H, W).

Shape legend: N clips, C channels, F frames, H W height and width in pixels, D features of a frame, K coefficients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flexidit.metrics.features import FeatureExtractor


class FrameFeatures(nn.Module):
    """Every frame of every clip as a sample of its own; F times as many samples as clips.

    Args:
        extractor: Of images, such as :class:`~flexidit.metrics.features.InceptionFeatures`.
        batch_size: Frames that go through it at once.
    """

    def __init__(self, extractor: FeatureExtractor, batch_size: int = 256) -> None:
        super().__init__()
        self.extractor, self.batch_size = extractor, batch_size
        self.name = f"{extractor.name}, per frame"
        self.fingerprint = f"{extractor.fingerprint}/frames"

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, F, H, W) in [-1, 1] -> (N * F, D), clip after clip.

        Raises:
            ValueError: for another shape.
        """
        if pixels.ndim != 5:
            raise ValueError(f"clips of shape (N, C, F, H, W) are needed, got {tuple(pixels.shape)}")
        frames = pixels.transpose(1, 2).flatten(0, 1)
        return torch.cat([self.extractor(part) for part in frames.split(self.batch_size)])


class ClipFeatures(nn.Module):
    """One vector a clip: the first temporal cosine coefficients of its frames' features.

    Args:
        extractor: Of images.
        num_coefficients: K; 1 is the mean over frames alone, and blind to their order.
        batch_size: Frames that go through it at once.

    Raises:
        ValueError: no coefficients.
    """

    def __init__(self, extractor: FeatureExtractor, num_coefficients: int = 3, batch_size: int = 256) -> None:
        super().__init__()
        if num_coefficients < 1:
            raise ValueError(f"a clip has one coefficient at least, got num_coefficients {num_coefficients}")
        self.frames, self.num_coefficients = FrameFeatures(extractor, batch_size), num_coefficients
        self.name = f"{extractor.name}, {num_coefficients} temporal coefficients over clips"
        self.fingerprint = f"{extractor.fingerprint}/clips-dct{num_coefficients}"

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, F, H, W) in [-1, 1] -> (N, K * D).

        Raises:
            ValueError: for another shape, or fewer frames than coefficients.
        """
        features = self.frames(pixels)
        if pixels.shape[2] < self.num_coefficients:
            raise ValueError(
                f"{self.num_coefficients} temporal coefficients need as many frames, got clips {tuple(pixels.shape)}"
            )
        features = features.view(len(pixels), -1, features.shape[-1])  # (N, F, D)
        matrix = cosine_matrix(features.shape[1]).to(features)[: self.num_coefficients]
        return torch.einsum("kf,nfd->nkd", matrix, features).flatten(1)


def cosine_matrix(num_frames: int) -> Tensor:
    """Orthonormal discrete cosine transform (DCT-II) over frames: (F, F) float64, slowest coefficient first."""
    number = torch.arange(num_frames, dtype=torch.float64)
    matrix = torch.cos(math.pi / num_frames * torch.outer(number, number + 0.5)) * math.sqrt(2 / num_frames)
    matrix[0] /= math.sqrt(2)
    return matrix
