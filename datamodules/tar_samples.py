"""Raw images and clips streamed from webdataset tars.

A sample is ``name.jpg`` (or ``name.mp4``) with ``name.cls``, or with ``name.txt`` or ``name.json``.

A stream has no random access, so what is exact elsewhere is bought here. What holds of a resume, and is tested with
processes that are killed (tests/distributed/test_resume.py):

- it is exact, bit for bit, in mid-epoch too, with any number of workers, of processes and of accumulated micro-batches.
  Shards are shuffled by (seed, epoch), dealt to ranks and then to workers, and samples shuffled in a buffer whose draws
  are keyed alike: the stream of a reader is a function of (seed, epoch, place among the readers), and the checkpoint
  says how many batches of it were consumed. Choices of captions and windows, flips and noise are keyed by sample;
- that many batches of the begun epoch are read again, decoded, and dropped. It costs the time that reading them took
  (not the model's), up to an epoch's worth; map-style data and stored latents pay nothing;
- it needs the tars, ``num_workers``, the number of processes and ``shuffle_buffer`` as they were: another number of
  readers deals the tars in another way. Such a change is refused by name, or accepted with ``--resume.allow_changes``:
  then the rest of the begun epoch is another one, in which some samples come twice and others not at all, and
  everything after it is as good as ever;
- an epoch ends after ``num_samples`` divided by the global batch, on all ranks alike. A rank whose tars hold less
  begins them again in another order; one whose tars hold more leaves the rest out. Tars of equal size lose least;
- tars that changed under their names, or a network source that answers in another way, are not noticed.
"""

import hashlib
import json
import logging
import math
import os
import random
import tarfile
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.tar_members import (
    MAX_FILE_BYTES,
    MAX_TEXT_BYTES,
    BrokenSampleError,
    member_fault,
    read_members,
)
from flexidit.captioned_images import caption_fault, parse_captions
from flexidit.draws import Draw, draw_choice, draw_flip
from flexidit.latent_shards import OnError, hash_lines
from flexidit.sample_readers import SampleReader
from flexidit.skips import BrokenFileError, SkipReport, printable

logger = logging.getLogger(__name__)
TarTarget = Literal["label", "caption"]
_TARGET_KEYS: dict[TarTarget, tuple[str, ...]] = {"label": ("cls",), "caption": ("txt", "json")}
_MAX_WORKERS = 256
_NAME_BYTES = 1 << 14
_MAX_EMPTY_PASSES = 8
_MAX_DIGITS = 9  # of a label


def expand_tars(source: str | Path) -> list[str]:
    """Sorted tars of a folder, or those of a brace pattern such as ``train-{0000..0146}.tar``.

    Raises:
        FileNotFoundError: if one of them, or all, do not exist.
    """
    from webdataset.shardlists import expand_urls

    is_folder = Path(source).is_dir()
    # With the folder before it, be it ".": a file that is called "pipe:..." would be run as a command.
    found = (os.path.join(source, path.name) for path in Path(source).glob("*.tar"))
    tars = sorted(found) if is_folder else expand_urls(str(source))
    missing = [tar for tar in tars if not _is_remote(tar) and not Path(tar).is_file()]
    if missing or not tars:
        raise FileNotFoundError(f"no tar at {missing[0] if missing else source}")
    return tars


class SharedSkips:
    """What the workers of one process left out: counted without limit, named as far as a buffer reaches.

    Workers hold copies of the data set. This lies in shared memory, one row a worker, so that nobody needs a lock.
    A sample that is met again, in a later epoch, is counted again and named once.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()
        self.names = torch.zeros(_MAX_WORKERS, _NAME_BYTES, dtype=torch.uint8).share_memory_()
        self.unnamed = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()

    def add(self, name: str, reason: str) -> None:
        """Count one more; called in a worker, or in the process itself."""
        info = get_worker_info()
        row = info.id % _MAX_WORKERS if info else 0
        self.counts[row] += 1
        line, text = json.dumps([name, reason]).encode(), self._text(row)
        start, end = len(text), len(text) + len(line)
        if line in text.splitlines():
            return
        if end >= _NAME_BYTES:
            self.unnamed[row] += 1
            return
        buffer = self.names[row].numpy()
        buffer[start:end] = np.frombuffer(line, np.uint8)
        buffer[end] = ord("\n")  # last: a line without its end is not read

    def report(self) -> SkipReport:
        """By name; what did not fit the buffer is one line at the end."""
        report = SkipReport()
        rows = self.names[:, 0].nonzero().flatten().tolist()
        lines = (line for row in rows for line in self._text(row).split(b"\n")[:-1])
        for line in dict.fromkeys(lines):
            report.add(*json.loads(line))
        if unnamed := int(self.unnamed.sum()):
            report.add("further samples", f"{unnamed} times, named in the log")
        return report

    def __len__(self) -> int:
        return int(self.counts.sum())

    def _text(self, row: int) -> bytes:
        return self.names[row].numpy().tobytes().rstrip(b"\0")


def count_samples(tars: list[str], target: TarTarget = "label") -> int:
    """Samples of local tars, by their labels or captions; reads headers only. A cut tar counts up to the cut.

    Raises:
        ValueError: if a tar is not a local file.
    """
    remote = next((tar for tar in tars if _is_remote(tar)), None)
    if remote:
        raise ValueError(f"the samples of {remote} cannot be counted from here: set num_train_samples")
    return sum(_count(tar, _TARGET_KEYS[target]) for tar in tars)


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


def _count(tar: str, keys: tuple[str, ...]) -> int:
    total, last = 0, None
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                name, _, suffix = member.name.rpartition(".")
                if suffix.lower() in keys and member_fault(member, MAX_TEXT_BYTES) is None:
                    total, last = total + (name != last), name  # name.txt and name.json are one sample
    except (tarfile.TarError, OSError, EOFError) as error:
        logger.warning("%s is damaged: %s", tar, error)
    return total


class TarSamples(IterableDataset[dict[str, Any]]):
    """Endless stream of one rank for training, or one pass over its tars for evaluation.

    Samples are ``{"x": pixels, "index", "epoch", "names"}`` with ``y``, the label, or ``texts``, one of the captions,
    drawn anew in every epoch, keyed by (seed, epoch, name of the sample). Captions are read as those beside image files
    are (:func:`~flexidit.captioned_images.find_captioned_images`): ``name.txt``, else ``name.json``.

    Args:
        tars: files or URLs.
        reader: what is read of a file.
        target: whether labels or captions belong to the files.
        num_samples: of all tars together; with ``batch_size`` it makes the length of an epoch, equal on all ranks.
        batch_size: of one process.
        training: shuffle, repeat, flip as asked.
        rank: of this process.
        world_size: number of processes.
        seed: of the order and the flips.
        flip: mirror half of the draws, when training.
        shuffle_buffer: samples held for shuffling.
        num_classes: for checking labels.
        on_error: count and name broken samples and tars, also those that break or vanish during the run, or refuse the
            first. Where a tar has vanished the others are read more often, and a resume of the run is not exact.
    """

    def __init__(
        self,
        tars: list[str],
        reader: SampleReader,
        *,
        target: TarTarget = "label",
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
        self.tars, self.reader, self.training, self.flip = tars, reader, training, flip and training
        self.size, self.seed, self.rank, self.num_replicas = num_samples, seed, rank, world_size
        self.shuffle_buffer, self.num_classes, self.on_error = shuffle_buffer, num_classes, on_error
        self.target = target
        self.num_batches = num_samples // (batch_size * world_size) if training else None
        self.epoch, self.shuffle = 0, training
        self.skips = SharedSkips()
        self.cut = cut_tars(tars)
        if self.cut and on_error == "raise":
            raise ValueError(f"{self.cut[0]} is cut short: write it again, or set on_error to skip")
        for tar in self.cut:
            logger.warning("%s is cut short: reading what is there", tar)
        if self.num_batches == 0:
            raise ValueError(f"{num_samples} samples do not fill one batch of {batch_size} on {world_size} process(es)")

    @property
    def num_skipped(self) -> int:
        """Broken samples met so far by all workers of this process, once in every epoch."""
        return len(self.skips)

    def report(self) -> SkipReport:
        """The cut tars, and the broken samples that all workers of this process met so far, by name."""
        report = SkipReport()
        for tar in self.cut:
            report.add(tar, "cut short")
        report.extend(self.skips.report())
        return report

    @property
    def content(self) -> str:
        """Hash of the names of the tars, without their folder."""
        return hash_lines(tar.rpartition("/")[2] for tar in self.tars)

    def seek(self, epoch: int) -> None:
        """Choose the order of the next iterators."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        passes, empty = 0, 0
        while True:
            count = 0
            for sample in self._pipeline(passes):
                count += 1
                yield sample
            passes, empty = passes + 1, 0 if count else empty + 1
            self._check_empty(empty)
            if not self.training or not self._has_tars():
                return

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

    @property
    def reads_what_others_read(self) -> bool:
        """Whether there is no tar for this rank alone, which only an evaluation accepts."""
        return self.rank >= len(self.tars)

    def count_even_batches(self, batch_size: int, num_workers: int) -> int | None:
        """Batches that each rank makes in an evaluation: as many as the rank with most has.

        Otherwise one would wait for others in the middle of a sharded model. None if tars are not local files.
        """
        if any(_is_remote(tar) for tar in self.tars):
            return None
        sizes = {tar: count_samples([tar], self.target) for tar in self.tars}
        workers = range(max(1, num_workers))
        dealt = [[sizes[tar] for tar in self._dealt(self.tars, rank)] for rank in range(self.num_replicas)]
        return max(sum(math.ceil(sum(own[worker :: len(workers)]) / batch_size) for worker in workers) for own in dealt)

    def _check_empty(self, empty: int) -> None:
        """Refuse tars without one usable sample, after some passes in a row that gave none.

        One of several readers may have drawn nothing but a damaged tar, and draws others in the next pass.
        """
        info = get_worker_info()
        is_alone = self.num_replicas == 1 and (info is None or info.num_workers == 1)
        patience = 1 if is_alone else min(len(self.tars), _MAX_EMPTY_PASSES) if self.training else math.inf
        if empty >= patience and self._has_tars():
            raise ValueError(
                f"none of the samples of {self.tars[0]} and the other tars can be read: "
                f"{self.report().summary('item', 3)}"
            )

    def _has_tars(self) -> bool:
        info = get_worker_info()
        return info is None or info.id < len(self._dealt(self.tars, self.rank))

    def _dealt(self, tars: list[str], rank: int) -> list[str]:
        """Those of a rank; in evaluation there may be fewer than ranks, and some read the same."""
        return tars[rank :: self.num_replicas] or [tars[rank % len(tars)]]

    def _pipeline(self, passes: int) -> Any:
        import webdataset as wds
        from webdataset.tariterators import group_by_keys

        rng = random.Random(f"{self.seed}/{self.epoch}/{passes}")  # the same on all ranks: they share one order
        tars = rng.sample(self.tars, len(self.tars)) if self.training else self.tars
        mine = wds.split_by_worker(iter(self._dealt(tars, self.rank)))
        stages = [partial(read_members, mine, self._limit, self._handle), partial(group_by_keys, handler=self._handle)]
        if self.training and self.shuffle_buffer > 1:
            stages.append(wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng))
        return wds.DataPipeline(*stages, wds.map(self._decode, handler=self._handle))

    def _limit(self, suffixes: str) -> int | None:
        """Bytes that a member may have; None: nobody reads it, pickles among others."""
        if f".{suffixes}" in self.reader.suffixes:
            return MAX_FILE_BYTES
        return MAX_TEXT_BYTES if suffixes in _TARGET_KEYS[self.target] else None

    def _decode(self, sample: dict[str, Any]) -> dict[str, Any]:
        name = f"{sample.get('__url__')}: {sample['__key__']}"
        draw = Draw(_number(sample["__key__"]), self.epoch)
        try:
            data = next((sample[key] for key in sample if f".{key}" in self.reader.suffixes), None)
            if data is None:
                raise BrokenFileError(f"has no {self.reader.noun}")
            target = self._label(sample) if self.target == "label" else self._caption(sample, name, draw)
            pixels = self.reader.read(data, draw, self.seed)
        except BrokenFileError as error:
            raise BrokenSampleError(name, str(error)) from error
        if self.flip and draw_flip(self.seed, draw):
            pixels = pixels.flip(-1)
        drawn = {"index": torch.tensor(draw.sample), "epoch": torch.tensor(draw.epoch)}
        return {"x": pixels, **target, **drawn, "names": printable(name)}

    def _label(self, sample: dict[str, Any]) -> dict[str, Any]:
        text = sample.get("cls", b"").decode(errors="replace").strip()
        if not text.isdecimal() or len(text) > _MAX_DIGITS:
            raise BrokenFileError("has no label" if not text else f"has the label {textwrap.shorten(text, 40)!r}")
        if self.num_classes is not None and int(text) >= self.num_classes:
            raise BrokenFileError(f"has class {text}, the model has {self.num_classes} classes")
        return {"y": torch.tensor(int(text))}

    def _caption(self, sample: dict[str, Any], name: str, draw: Draw) -> dict[str, Any]:
        captions, faults = _read_captions(sample)
        if not captions:
            raise BrokenFileError(faults[0])
        for fault in faults:
            self._handle(BrokenSampleError(name, fault))
        return {"texts": captions[draw_choice(self.seed, draw, len(captions))]}

    def _handle(self, error: Exception) -> bool:
        """Count, name and go on; True tells webdataset to continue."""
        broken = error if isinstance(error, BrokenSampleError) else _name(error)
        if self.on_error == "raise":
            raise ValueError(str(broken)) from error
        self.skips.add(broken.name, broken.reason)
        logger.warning("skipped %s", broken)
        return True


def _read_captions(sample: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(captions, what is wrong with others); the text goes before the JSON, as with files beside others."""
    key = next((key for key in _TARGET_KEYS["caption"] if key in sample), None)
    try:
        found = None if key is None else parse_captions(sample[key], f".{key}")
    except ValueError as error:
        raise BrokenFileError(f".{key} {error}") from error
    if not found:
        raise BrokenFileError("has no caption" if found is None else "empty caption")
    texts = found if isinstance(found, list) else [found]
    faults = [fault for fault in map(caption_fault, texts) if fault]
    return list(dict.fromkeys(text.strip() for text in texts if not caption_fault(text))), faults


def _name(error: Exception) -> BrokenSampleError:
    """webdataset's errors carry the tar behind the message, or a member before the colon of the message."""
    texts = [part for part in error.args if isinstance(part, str)] or [type(error).__name__]
    if len(texts) > 1:
        return BrokenSampleError(texts[-1], " ".join(texts[:-1]))
    name, _, reason = texts[0].partition(": ")
    return BrokenSampleError(name, reason or type(error).__name__)


def _number(key: str) -> int:
    """A number for a sample's name, for keying its draws."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
