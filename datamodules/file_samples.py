"""Map-style raw images and clips: cropped, flipped, with broken files replaced and counted.

Shape legend: N batch, F frames of clips, H W height and width.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flexidit.draws import Draw, draw_flip
from flexidit.latent_shards import OnError, hash_lines
from flexidit.sample_readers import SampleReader
from flexidit.skips import BrokenFileError, SkipReport

logger = logging.getLogger(__name__)
_MAX_TRIES = 256


class FileSamples(Dataset[dict[str, Any]], ABC):
    """Pixels of image or clip files; ``dataset[Draw(sample, epoch)]`` is pure. Subclasses say what belongs to a file.

    A broken file is replaced by the next one that can be read, so that batches keep their size. Which ones are
    broken is written to a mask in shared memory: the main process learns what its workers found.

    Args:
        root: folder of the files.
        files: paths relative to ``root``.
        skips: what was left out before.
        reader: what is read of a file.
        seed: key of the flips and of what the reader draws.
        flip: mirror half of the draws.
        on_error: replace and count broken files, or refuse the first.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        skips: SkipReport,
        reader: SampleReader,
        *,
        seed: int,
        flip: bool,
        on_error: OnError,
    ) -> None:
        self.root, self.files, self.skips = root, files, skips
        self.reader, self.seed, self.flip, self.on_error = reader, seed, flip, on_error
        self.broken = torch.zeros(len(files), dtype=torch.bool).share_memory_()
        self._reasons: dict[int, str] = {}

    @abstractmethod
    def targets(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """What belongs to the files of these draws, each value of length N."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        """One sample, as :meth:`__getitems__` without N."""
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[int | Draw]) -> dict[str, Any]:
        """A batch: ``x`` in [-1, 1], the targets, ``index`` and ``epoch`` of each draw, (N,) int64, and ``names``.

        ``x`` is (N, 3, H, W) of images and (N, 3, F, H, W) of clips.
        """
        draws, pixels = zip(*(self._read(Draw.of(key)) for key in keys), strict=True)
        index, epoch = (torch.tensor(values) for values in zip(*draws, strict=True))
        names = [self.files[draw.sample] for draw in draws]
        return {"x": torch.stack(pixels), **self.targets(draws), "index": index, "epoch": epoch, "names": names}

    @cached_property
    def content(self) -> str:
        """Hash of the names of the files."""
        return hash_lines(self.files)

    def report(self) -> SkipReport:
        """The files that were found broken so far, by all workers of this process, and those left out before."""
        report = SkipReport(list(self.skips))
        for index in self.broken.nonzero().flatten().tolist():
            report.add(self.files[index], self._reason(index))
        return report

    def _path(self, index: int) -> Path:
        return self.root / self.files[index]

    def _reason(self, index: int) -> str:
        """Why a file is broken: read again, once, since a worker may have found it."""
        if index not in self._reasons:
            self._reasons[index] = "could not be read before"
            try:
                self.reader.read(self._path(index))
            except BrokenFileError as error:
                self._reasons[index] = str(error)
        return self._reasons[index]

    def _read(self, draw: Draw) -> tuple[Draw, Tensor]:
        for step in range(min(len(self), _MAX_TRIES)):
            candidate = Draw((draw.sample + step) % len(self), draw.epoch)
            pixels = self._try(candidate)
            if pixels is not None:
                return candidate, pixels.flip(-1) if self.flip and draw_flip(self.seed, candidate) else pixels
        raise ValueError(f"{min(len(self), _MAX_TRIES)} {self.reader.noun}s in a row of {self.root} cannot be read")

    def _try(self, draw: Draw) -> Tensor | None:
        if self.broken[draw.sample]:
            return None
        path = self._path(draw.sample)
        try:
            return self.reader.read(path, draw, self.seed)
        except BrokenFileError as error:
            if self.on_error == "raise":
                raise ValueError(f"{path} cannot be read: {error}") from error
            logger.warning("skipped %s: %s", path, error)
            self.broken[draw.sample] = True
            return None
