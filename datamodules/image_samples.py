"""Map-style raw images with labels.

Shape legend: N batch, S side of the square crop.
"""

from collections.abc import Sequence
from typing import Any

import torch

from datamodules.file_samples import FileSamples
from flexidit.draws import Draw
from flexidit.images import ImageIndex
from flexidit.latent_shards import OnError
from flexidit.sample_readers import ImageReader


class ImageSamples(FileSamples):
    """Pixels and labels of an :class:`~flexidit.images.ImageIndex`; batches have ``y`` (N,) int64.

    Args:
        images: what to read.
        size: S.
        seed: key of the flips.
        flip: mirror half of the draws.
        on_error: replace and count broken images, or refuse the first.
    """

    def __init__(self, images: ImageIndex, size: int, *, seed: int = 0, flip: bool = True, on_error: OnError = "skip"):
        super().__init__(
            images.root, images.files, images.skips, ImageReader(size), seed=seed, flip=flip, on_error=on_error
        )
        self.labels = torch.tensor(images.labels, dtype=torch.int64)

    def targets(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """``y`` (N,)."""
        return {"y": self.labels[[draw.sample for draw in draws]]}
