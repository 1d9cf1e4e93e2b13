"""Map-style raw images: cropped, flipped, with broken files replaced and counted.

Shape legend: N batch, S side of the square crop.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flexidit.draws import Draw, draw_flip
from flexidit.images import BrokenImageError, ImageIndex, read_pixels
from flexidit.latent_shards import OnError
from flexidit.skips import SkipReport

logger = logging.getLogger(__name__)
_MAX_TRIES = 256


class ImageSamples(Dataset[dict[str, Tensor]]):
    """Pixels and labels of an :class:`~flexidit.images.ImageIndex`; ``dataset[Draw(sample, epoch)]`` is pure.

    A broken image is replaced by the next one that can be read, so that batches keep their size. Which ones are
    broken is written to a mask in shared memory: the main process learns what its workers found.

    Args:
        images: what to read.
        size: S.
        seed: key of the flips.
        flip: mirror half of the draws.
        on_error: replace and count broken images, or refuse the first.
    """

    def __init__(self, images: ImageIndex, size: int, *, seed: int = 0, flip: bool = True, on_error: OnError = "skip"):
        self.images, self.size, self.seed, self.flip, self.on_error = images, size, seed, flip, on_error
        self.labels = torch.tensor(images.labels, dtype=torch.int64)
        self.broken = torch.zeros(len(images), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | Draw) -> dict[str, Tensor]:
        """One sample, as :meth:`__getitems__` without N."""
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[int | Draw]) -> dict[str, Tensor]:
        """A batch: ``x`` (N, 3, S, S) in [-1, 1], ``y``, and the ``index`` and ``epoch`` of each draw, (N,) int64."""
        draws, pixels = zip(*(self._read(Draw.of(key)) for key in keys), strict=True)
        index, epoch = (torch.tensor(values) for values in zip(*draws, strict=True))
        return {"x": torch.stack(pixels), "y": self.labels[index], "index": index, "epoch": epoch}

    def report(self) -> SkipReport:
        """The images that were found broken so far, by all workers of this process, and those without a label."""
        report = SkipReport(list(self.images.skips))
        for index in self.broken.nonzero().flatten().tolist():
            report.add(self.images.files[index], self._reason(index))
        return report

    def _reason(self, index: int) -> str:
        try:
            read_pixels(self.images.path(index), self.size)
        except BrokenImageError as error:
            return str(error)
        return "could not be read before"

    def _read(self, draw: Draw) -> tuple[Draw, Tensor]:
        for step in range(min(len(self), _MAX_TRIES)):
            candidate = Draw((draw.sample + step) % len(self), draw.epoch)
            pixels = self._try(candidate.sample)
            if pixels is not None:
                return candidate, pixels.flip(-1) if self.flip and draw_flip(self.seed, candidate) else pixels
        raise ValueError(f"{min(len(self), _MAX_TRIES)} images in a row of {self.images.root} cannot be read")

    def _try(self, index: int) -> Tensor | None:
        if self.broken[index]:
            return None
        try:
            return read_pixels(self.images.path(index), self.size)
        except BrokenImageError as error:
            if self.on_error == "raise":
                raise ValueError(f"{self.images.path(index)} cannot be read: {error}") from error
            logger.warning("skipped %s: %s", self.images.path(index), error)
            self.broken[index] = True
            return None
