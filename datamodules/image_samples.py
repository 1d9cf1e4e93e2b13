"""Map-style raw images: cropped, flipped, with broken files replaced and counted.

Shape legend: N batch, S side of the square crop.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flexidit.draws import Draw, draw_flip
from flexidit.images import BrokenImageError, ImageIndex, read_pixels
from flexidit.latent_shards import OnError
from flexidit.skips import SkipReport

logger = logging.getLogger(__name__)
_MAX_TRIES = 256


class FileSamples(Dataset[dict[str, Any]], ABC):
    """Pixels of image files; ``dataset[Draw(sample, epoch)]`` is pure. Subclasses say what belongs to an image.

    A broken image is replaced by the next one that can be read, so that batches keep their size. Which ones are
    broken is written to a mask in shared memory: the main process learns what its workers found.

    Args:
        root: folder of the images.
        files: images, relative to ``root``.
        skips: what was left out before.
        size: S.
        seed: key of the flips.
        flip: mirror half of the draws.
        on_error: replace and count broken images, or refuse the first.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        skips: SkipReport,
        size: int,
        *,
        seed: int,
        flip: bool,
        on_error: OnError,
    ) -> None:
        self.root, self.files, self.skips = root, files, skips
        self.size, self.seed, self.flip, self.on_error = size, seed, flip, on_error
        self.broken = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    @abstractmethod
    def targets(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """What belongs to the images of these draws, each value of length N."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        """One sample, as :meth:`__getitems__` without N."""
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[int | Draw]) -> dict[str, Any]:
        """A batch: ``x`` (N, 3, S, S) in [-1, 1], the targets, and ``index`` and ``epoch`` of each draw, (N,) int64."""
        draws, pixels = zip(*(self._read(Draw.of(key)) for key in keys), strict=True)
        index, epoch = (torch.tensor(values) for values in zip(*draws, strict=True))
        return {"x": torch.stack(pixels), **self.targets(draws), "index": index, "epoch": epoch}

    def report(self) -> SkipReport:
        """The images that were found broken so far, by all workers of this process, and those left out before."""
        report = SkipReport(list(self.skips))
        for index in self.broken.nonzero().flatten().tolist():
            report.add(self.files[index], self._reason(index))
        return report

    def _path(self, index: int) -> Path:
        return self.root / self.files[index]

    def _reason(self, index: int) -> str:
        try:
            read_pixels(self._path(index), self.size)
        except BrokenImageError as error:
            return str(error)
        return "could not be read before"

    def _read(self, draw: Draw) -> tuple[Draw, Tensor]:
        for step in range(min(len(self), _MAX_TRIES)):
            candidate = Draw((draw.sample + step) % len(self), draw.epoch)
            pixels = self._try(candidate.sample)
            if pixels is not None:
                return candidate, pixels.flip(-1) if self.flip and draw_flip(self.seed, candidate) else pixels
        raise ValueError(f"{min(len(self), _MAX_TRIES)} images in a row of {self.root} cannot be read")

    def _try(self, index: int) -> Tensor | None:
        if self.broken[index]:
            return None
        try:
            return read_pixels(self._path(index), self.size)
        except BrokenImageError as error:
            if self.on_error == "raise":
                raise ValueError(f"{self._path(index)} cannot be read: {error}") from error
            logger.warning("skipped %s: %s", self._path(index), error)
            self.broken[index] = True
            return None


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
        super().__init__(images.root, images.files, images.skips, size, seed=seed, flip=flip, on_error=on_error)
        self.labels = torch.tensor(images.labels, dtype=torch.int64)

    def targets(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """``y`` (N,)."""
        return {"y": self.labels[[draw.sample for draw in draws]]}
