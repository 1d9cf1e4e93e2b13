"""Raw images streamed from webdataset tars (``name.jpg`` with ``name.cls``).

A stream has no random access, so what is exact elsewhere is bought here: shards are shuffled and dealt to ranks and
workers by (seed, epoch), samples are shuffled in a buffer, and a resume reads again what the interrupted epoch had
consumed. It is exact if the tars, the number of workers and the number of ranks are as they were.

Shape legend: S side of the square crop.
"""

import hashlib
import logging
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flexidit.draws import Draw, draw_flip
from flexidit.images import BrokenImageError, read_pixels
from flexidit.latent_shards import OnError

logger = logging.getLogger(__name__)
_IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
_MAX_WORKERS = 256


def expand_tars(source: str | Path) -> list[str]:
    """Sorted tars of a folder, or those of a brace pattern such as ``train-{0000..0146}.tar``.

    Raises:
        FileNotFoundError: if one of them, or all, do not exist.
    """
    from webdataset.shardlists import expand_urls

    is_folder = Path(source).is_dir()
    tars = sorted(map(str, Path(source).glob("*.tar"))) if is_folder else expand_urls(str(source))
    missing = [tar for tar in tars if not _is_remote(tar) and not Path(tar).is_file()]
    if missing or not tars:
        raise FileNotFoundError(f"no tar at {missing[0] if missing else source}")
    return tars


def count_samples(tars: list[str]) -> int:
    """Samples of local tars, by their ``.cls`` members; reads headers only. A cut tar counts up to the cut.

    Raises:
        ValueError: if a tar is not a local file.
    """
    remote = next((tar for tar in tars if _is_remote(tar)), None)
    if remote:
        raise ValueError(f"the samples of {remote} cannot be counted from here: set num_train_samples")
    return sum(_count(tar) for tar in tars)


def cut_tars(tars: list[str]) -> list[str]:
    """Local tars without the two empty blocks that end an archive: what follows the cut is gone without an error."""
    return [tar for tar in tars if not _is_remote(tar) and not _has_end(Path(tar))]


def _has_end(path: Path) -> bool:
    if path.stat().st_size < 1024:
        return False
    with path.open("rb") as handle:
        handle.seek(-1024, 2)
        return not any(handle.read())


def _is_remote(tar: str) -> bool:
    return "://" in tar or tar.startswith("pipe:")


def _count(tar: str) -> int:
    total = 0
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                total += member.name.endswith(".cls")
    except (tarfile.TarError, OSError, EOFError) as error:
        logger.warning("%s is damaged: %s", tar, error)
    return total


class TarSamples(IterableDataset[dict[str, Tensor]]):
    """Endless stream of one rank for training, or one pass over its tars for evaluation.

    Args:
        tars: files or URLs.
        size: S.
        num_samples: of all tars together; with ``batch_size`` it makes the length of an epoch, equal on all ranks.
        batch_size: of one process.
        training: shuffle, repeat, flip as asked.
        rank: of this process.
        world_size: number of processes.
        seed: of the order and the flips.
        flip: mirror half of the draws, when training.
        shuffle_buffer: samples held for shuffling.
        num_classes: for checking labels.
        on_error: count and name broken samples, or refuse the first.
    """

    def __init__(
        self,
        tars: list[str],
        size: int,
        *,
        num_samples: int,
        batch_size: int,
        training: bool,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        flip: bool = True,
        shuffle_buffer: int = 1000,
        num_classes: int | None = None,
        on_error: OnError = "skip",
    ) -> None:
        self.tars, self.image_size, self.training, self.flip = tars, size, training, flip and training
        self.size, self.seed, self.rank, self.num_replicas = num_samples, seed, rank, world_size
        self.shuffle_buffer, self.num_classes, self.on_error = shuffle_buffer, num_classes, on_error
        self.num_batches = num_samples // (batch_size * world_size) if training else None
        self.epoch, self.shuffle = 0, training
        self._num_skipped = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()  # by worker
        self.cut = cut_tars(tars)
        if self.cut and on_error == "raise":
            raise ValueError(f"{self.cut[0]} is cut short: write it again, or set on_error to skip")
        for tar in self.cut:
            logger.warning("%s is cut short: reading what is there", tar)
        if self.num_batches == 0:
            raise ValueError(f"{num_samples} samples do not fill one batch of {batch_size} on {world_size} process(es)")

    @property
    def num_skipped(self) -> int:
        """Broken samples met so far by all workers of this process; the log names them."""
        return int(self._num_skipped.sum())

    def seek(self, epoch: int) -> None:
        """Choose the order of the next iterators."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        passes = 0
        while True:
            count = 0
            for sample in self._pipeline(passes):
                count += 1
                yield sample
            passes += 1
            if not self.training or not self._has_tars():
                return
            if not count:
                raise ValueError(f"none of the samples of {self.tars[0]} and the other tars can be read")

    def check_shards(self, num_workers: int) -> None:
        """Refuse fewer tars than reading processes: some would have nothing to read.

        Raises:
            ValueError: with what to change.
        """
        readers = self.num_replicas * max(1, num_workers)
        if self.training and len(self.tars) < readers:
            raise ValueError(
                f"{len(self.tars)} tars cannot feed {readers} readers ({self.num_replicas} processes with "
                f"{max(1, num_workers)} workers): lower num_workers, or write more and smaller tars"
            )

    def _has_tars(self) -> bool:
        info = get_worker_info()
        return info is None or info.id < len(self.tars[self.rank :: self.num_replicas])

    def _pipeline(self, passes: int) -> Any:
        import webdataset as wds

        rng = random.Random(f"{self.seed}/{self.epoch}/{passes}")  # the same on all ranks: they share one order
        tars = rng.sample(self.tars, len(self.tars)) if self.training else self.tars
        stream = wds.WebDataset(
            tars, nodesplitter=self._split_by_rank, shardshuffle=False, handler=self._handle, empty_check=False
        )
        if self.training and self.shuffle_buffer > 1:
            stream = stream.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)
        return stream.map(self._decode, handler=self._handle)

    def _split_by_rank(self, tars: Iterator[Any]) -> Iterator[Any]:
        return (tar for position, tar in enumerate(tars) if position % self.num_replicas == self.rank)

    def _decode(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        name = f"{sample.get('__url__')}: {sample['__key__']}"
        data = next((sample[key] for key in _IMAGE_KEYS if key in sample), None)
        if data is None:
            raise BrokenImageError(f"{name} has no image")
        label = self._label(sample, name)
        try:
            pixels = read_pixels(data, self.image_size)
        except BrokenImageError as error:
            raise BrokenImageError(f"{name}: {error}") from error
        draw = Draw(_number(sample["__key__"]), self.epoch)
        if self.flip and draw_flip(self.seed, draw):
            pixels = pixels.flip(-1)
        numbers = {"y": label, "index": draw.sample, "epoch": draw.epoch}
        return {"x": pixels, **{key: torch.tensor(value) for key, value in numbers.items()}}

    def _label(self, sample: dict[str, Any], name: str) -> int:
        text = sample.get("cls", b"").decode(errors="replace").strip()
        if not text.isdecimal():
            raise BrokenImageError(f"{name} has no label" if not text else f"{name} has the label {text!r}")
        if self.num_classes is not None and int(text) >= self.num_classes:
            raise BrokenImageError(f"{name} has class {text}, the model has {self.num_classes} classes")
        return int(text)

    def _handle(self, error: Exception) -> bool:
        """Count, name and go on; True tells webdataset to continue."""
        if self.on_error == "raise":
            raise ValueError(str(error)) from error
        info = get_worker_info()
        self._num_skipped[info.id % _MAX_WORKERS if info else 0] += 1
        logger.warning("skipped %s", " ".join(str(part) for part in error.args if isinstance(part, str)))
        return True


def _number(key: str) -> int:
    """A number for a sample's name, for keying its draws."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
