"""Latents on disk: the format, its fingerprint, and a memory-mapped reader that resamples them.

A folder of latents holds::

    metadata.json             fingerprint, source, and one entry a shard (see ``latent_metadata.py``)
    shard-00000.safetensors   mean, mean_flip (N, Z, h, w); std, std_flip if the VAE is not deterministic;
                              index (N,) int64, position in the sorted list of source files; and what the model is
                              told beside the samples: label (N,) int64, or captions (see ``caption_shards.py``)
    shard-00000.jsonl         {"index", "file", "label"} of each row, or {"index", "file", "captions"}

Samples are images, or clips with latents (N, Z, f, h, w): nothing else differs.

Shape legend: N samples of a shard, Z latent channels, f latent frames, h w latent height and width.

The mean and deviation of the VAE's posterior are stored, of the sample and of its mirror image, so that each epoch
draws new latents and flips as training from pixels would. Files appear under their final name only when complete.
"""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from flexidit.draws import Draw, draw_flip, draw_noise
from flexidit.fingerprints import check_fingerprint
from flexidit.latent_metadata import Metadata, ShardEntry
from flexidit.lost_shards import LostShards
from flexidit.skips import SkipReport

OnError = Literal["skip", "raise"]
_HINT = "run `flexidit encode` again to complete it, or set on_error to skip"
logger = logging.getLogger(__name__)


def hash_lines(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(handle)


def _sha256(handle: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


class StoredLatents(Dataset[Any]):
    """Map-style, memory-mapped latents, without what the model is told beside them: that is up to the subclasses.

    A sample is ``mean + std * noise`` of the image or clip or, half of the time, of its mirror image; flip and noise
    are keyed by (seed, epoch, position in the source), so skipped files change nothing for the others.

    Shards may also go while a run is on: their samples are replaced (:class:`~flexidit.lost_shards.LostShards`). What
    is read from then on depends on when it was noticed, and a resume, which finds fewer samples, is not exact.

    Args:
        root: folder written by ``flexidit encode``.
        expected: fingerprint fields that the latents must have; None accepts any.
        seed: key of the flips and the noise.
        flip: draw flips. If the latents have no mirror images, asking for flips is refused.
        on_error: what to do with shards that are missing or cut, now or later, and with an encoding that is not
            complete: leave them out and count them, or refuse.

    Raises:
        FileNotFoundError: if there are no latents.
        ValueError: in one sentence, if they do not fit the run or nothing can be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        expected: Mapping[str, Any] | None = None,
        seed: int = 0,
        flip: bool = True,
        on_error: OnError = "skip",
    ) -> None:
        self.root = Path(root)
        self.metadata = Metadata.load(root)
        self._check_kind()
        check_fingerprint(self.metadata.fingerprint, expected or {}, str(root))
        if flip and not self.metadata.fingerprint["has_flip"]:
            raise ValueError(f"the latents in {root} have no mirror images: set flip to false, or encode them again")
        self.seed, self.flip, self.on_error = seed, flip, on_error
        self._damaged = SkipReport()
        self._handles: dict[str, Any] = {}
        self._read_tables()
        self._check_readable()
        self._warn()

    @property
    def shape(self) -> tuple[int, ...]:
        """(Z, h, w), or (Z, f, h, w) of clips."""
        return tuple(self.metadata.latent_shape)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """How the latents were made."""
        return self.metadata.fingerprint

    @property
    def report(self) -> SkipReport:
        """Shards that were left out from the beginning, and those that were lost since, noticed by any worker."""
        report = SkipReport(list(self._damaged))
        for shard in self.lost:
            report.add(self._files[shard], f"lost during the run, {self.lost.sizes[shard]} samples")
        return report

    def check_files(self) -> None:
        """Notice shards that are gone or cut by now, before a cut one is read, which would kill the process."""
        entries = {entry.file: entry for entry in self.metadata.entries()}
        for shard, file in enumerate(self._files):
            with suppress(OSError):  # a file system that does not answer now may do so later
                reason = None if shard in self.lost else entries[file].damage(self.root)
                if reason is not None:
                    self._lose(shard, reason)

    def __len__(self) -> int:
        return len(self.indices)

    def moments(self, index: int, flipped: bool = False) -> tuple[Tensor, Tensor | None]:
        """Stored mean and deviation of one sample, (Z, h, w) float32; None for a deterministic VAE."""
        handle, row = self._find(index)
        suffix = "_flip" if flipped else ""
        mean = handle.get_slice("mean" + suffix)[row].float()
        has_std = "std" in handle.keys()  # noqa: SIM118 (a safetensors handle is no mapping)
        return mean, handle.get_slice("std" + suffix)[row].float() if has_std else None

    def _check_kind(self) -> None:
        """Refuse latents with other companions than the subclass reads."""

    def _read_companions(self, handle: Any) -> Any:
        """The small tables of a shard that stay in memory; raises ValueError if they contradict one another."""

    def _set_companions(self, tables: list[Any]) -> None:
        """Keep those of all readable shards, in order."""

    def _locate(self, index: int) -> tuple[int, int]:
        """Shard of a sample, counted among those that can be read, and its row there."""
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _find(self, index: int) -> tuple[Any, int]:
        """The open shard of a sample and its row there."""
        shard, row = self._locate(index)
        return self._open(self._files[shard]), row

    def _readable(self, draw: Draw) -> Draw:
        """The draw or, if its shard is lost, that of another sample."""
        found = draw
        while not self._can_open(self._locate(found.sample)[0]):
            found = Draw(self.lost.replacement(self.seed, self._source_draw(draw)), draw.epoch)
        return found

    def _can_open(self, shard: int) -> bool:
        if shard in self.lost:
            return False
        try:
            self._open(self._files[shard])
        except (OSError, SafetensorError) as error:
            self._lose(shard, f"unreadable: {error}")
            return False
        return True

    def _lose(self, shard: int, reason: str) -> None:
        file = f"shard {self._files[shard]} of {self.root}"
        if self.on_error == "raise":
            raise ValueError(f"{file} was lost during the run ({reason}): restore it, and go on with --ckpt_path last")
        logger.warning("%s was lost (%s): other samples are read in the place of its own", file, reason)
        self.lost.add(shard)

    def _names(self, draws: Sequence[Draw]) -> list[str]:
        """Of samples: file and row, which is a line of the .jsonl beside it."""
        places = (self._locate(draw.sample) for draw in draws)
        return [f"{self._files[shard]} row {row}" for shard, row in places]

    def _source_draw(self, draw: Draw) -> Draw:
        """The key of a sample's draws: its place in the source, which the absence of others does not change."""
        return Draw(int(self.indices[draw.sample]), draw.epoch)

    def _sample(self, draw: Draw) -> Tensor:
        source = self._source_draw(draw)
        mean, std = self.moments(draw.sample, self.flip and draw_flip(self.seed, source))
        return mean if std is None else mean + std * draw_noise(self.seed, source, self.shape)

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(self.root / file, framework="pt")
        return self._handles[file]

    def _read_tables(self) -> None:
        """Source positions and companions of all readable shards; damaged shards are counted."""
        indices, companions, self._files = [], [], []
        for entry in self.metadata.entries():
            reason = entry.damage(self.root)
            try:
                if reason is None and entry.count:
                    handle = self._open(entry.file)
                    self._check_rows(handle, entry.count)
                    companions.append(self._read_companions(handle))
                    indices.append(handle.get_tensor("index"))
                    self._files.append(entry.file)
            except (SafetensorError, OSError) as error:
                reason = f"unreadable: {error}"
            except ValueError as error:
                reason = str(error)
            if reason is not None:
                self._handle_damage(entry, reason)
        self.lost = LostShards([len(index) for index in indices])
        self._ends = list(accumulate(self.lost.sizes))
        self.indices = torch.cat([torch.empty(0, dtype=torch.int64), *indices])
        self._set_companions(companions)

    def _handle_damage(self, entry: ShardEntry, reason: str) -> None:
        if self.on_error == "raise":
            raise ValueError(f"shard {entry.file} of {self.root} is damaged ({reason}): {_HINT}")
        self._damaged.add(entry.file, f"{reason}, {entry.count} samples")

    def _check_rows(self, handle: Any, count: int) -> None:
        """Refuse a shard whose tensors are not what the metadata says, before a step finds out."""
        wanted = {"index": [count], "mean": [count, *self.metadata.latent_shape]}
        wanted |= {"mean_flip": wanted["mean"]} if self.metadata.fingerprint.get("has_flip") else {}
        wanted |= {name: wanted["mean"] for name in handle.keys() if name in ("std", "std_flip")}  # noqa: SIM118
        for name, shape in wanted.items():
            found = handle.get_slice(name).get_shape()
            if found != shape:
                raise ValueError(f"its {name} has the shape {found}, the metadata say {shape}")

    def _check_readable(self) -> None:
        if not len(self):
            raise ValueError(f"no shard in {self.root} can be read ({self._damaged.summary('shard')}): encode again")
        if not self.metadata.complete and self.on_error == "raise":
            raise ValueError(f"the encoding in {self.root} was interrupted: {_HINT}")

    def _warn(self) -> None:
        if len(self._damaged):
            logger.warning("%s: %s", self.root, self._damaged.summary("shard"))
        if not self.metadata.complete:
            logger.warning("%s: the encoding was interrupted, %d samples are there", self.root, len(self))
        std = self.metadata.statistics()["std"]
        if not 0.2 < sum(std) / len(std) < 5:  # unscaled SD latents have 5.5; it cost others an FID of 130
            logger.warning("%s: latents have standard deviations %s, expected about 1: wrong scaling?", self.root, std)

    def __getstate__(self) -> dict[str, Any]:
        # memory maps do not travel to workers: each process opens its own
        return {**self.__dict__, "_handles": {}}


class LatentShards(StoredLatents):
    """Labelled latents: ``dataset[Draw(sample, epoch)]`` is a pure function of its arguments.

    Args:
        root: folder written by ``flexidit encode``.
        expected, seed, flip, on_error: as in :class:`StoredLatents`.
        num_classes: classes of the model, for checking labels; None accepts any.

    Raises:
        FileNotFoundError: if there are no latents.
        ValueError: in one sentence, if they do not fit the run or nothing can be read.
    """

    labels: Tensor
    """(N,) int64."""

    def __init__(
        self,
        root: str | Path,
        *,
        expected: Mapping[str, Any] | None = None,
        seed: int = 0,
        flip: bool = True,
        on_error: OnError = "skip",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(root, expected=expected, seed=seed, flip=flip, on_error=on_error)
        if num_classes is not None and int(self.labels.max()) >= num_classes:
            largest = int(self.labels.max())
            raise ValueError(f"the latents in {root} have class {largest}, the model has {num_classes} classes")

    def __getitem__(self, key: int | Draw) -> dict[str, Tensor]:
        """One sample: ``x`` (Z, h, w) float32 and ``y`` () int64."""
        draw = self._readable(Draw.of(key))
        return {"x": self._sample(draw), "y": self.labels[draw.sample]}

    def __getitems__(self, keys: Sequence[int | Draw]) -> dict[str, Any]:
        """A batch: ``x`` (N, Z, h, w) float32, ``y`` (N,) int64, and ``names``."""
        draws = [self._readable(Draw.of(key)) for key in keys]
        x = torch.stack([self._sample(draw) for draw in draws])
        return {"x": x, "y": self.labels[[draw.sample for draw in draws]], "names": self._names(draws)}

    def _check_kind(self) -> None:
        if "text_encoder" in self.fingerprint:
            raise ValueError(f"the latents in {self.root} have captions and no labels: they are for text-to-image data")

    def _read_companions(self, handle: Any) -> Tensor:
        labels = handle.get_tensor("label")
        if labels.shape != handle.get_tensor("index").shape or bool((labels < 0).any()):
            raise ValueError("its labels are not one number from 0 on for each sample")
        return labels

    def _set_companions(self, tables: list[Tensor]) -> None:
        self.labels = torch.cat([torch.empty(0, dtype=torch.int64), *tables])
