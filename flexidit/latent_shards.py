"""Latents on disk: the format, its fingerprint, and a memory-mapped reader that resamples them.

A folder of latents holds::

    metadata.json             fingerprint, source, and one entry a shard (see :class:`Metadata`)
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
import json
import logging
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from flexidit.draws import Draw, draw_flip, draw_noise
from flexidit.files import write_atomically
from flexidit.skips import SkipReport

FORMAT = "flexidit-latents-1"
METADATA_FILE = "metadata.json"
OnError = Literal["skip", "raise"]
_HINT = "run `flexidit encode` again to complete it, or set on_error to skip"
logger = logging.getLogger(__name__)


@dataclass
class ShardEntry:
    """What the metadata says about one shard."""

    file: str
    count: int
    bytes: int
    sha256: str
    channel_mean: list[float]
    """Mean of the sampled latents per channel, in the model's scale."""
    channel_std: list[float]
    """Standard deviation of the sampled latents per channel, the VAE's own deviation included."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """What was left out."""
    truncated: list[dict[str, str]] = field(default_factory=list)
    """Captions that lost their ends."""

    def damage(self, root: Path) -> str | None:
        """Why the file cannot be used, or None; looks at its size and not at its content."""
        path = root / self.file
        if not path.is_file():
            return "missing"
        if path.stat().st_size != self.bytes:
            return f"cut or altered: {path.stat().st_size} of {self.bytes} bytes"
        return None


@dataclass
class Metadata:
    """Content of ``metadata.json``."""

    fingerprint: dict[str, Any]
    """What makes latents interchangeable: codec, sizes, crop, flips; of captioned ones the text encoder too."""
    source: dict[str, Any]
    """What was encoded, for continuing: number of files, hash of names with labels or captions, shard size, dtype."""
    latent_shape: list[int]
    complete: bool = False
    shards: dict[str, ShardEntry] = field(default_factory=dict)
    """By shard number, written as text."""

    @classmethod
    def load(cls, root: str | Path) -> "Metadata":
        """Read it from a folder of latents.

        Raises:
            FileNotFoundError: if the folder holds no metadata.
            ValueError: if the file is damaged or of another format.
        """
        path = Path(root) / METADATA_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no latents in {root}: it has no {METADATA_FILE}; run `flexidit encode`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format", None) != FORMAT:
                raise ValueError(f"not of format {FORMAT}")
            shards = {number: ShardEntry(**entry) for number, entry in content.pop("shards").items()}
            return cls(**content, shards=shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not readable as latent metadata ({error}): encode again") from error

    def save(self, root: Path) -> None:
        """Write it to a folder, atomically."""
        content = {"format": FORMAT, **asdict(self)}
        content["shards"] = dict(sorted(content["shards"].items(), key=lambda item: int(item[0])))
        for entry in content["shards"].values():
            if not entry["truncated"]:  # labels have none, and readers without captions do not know the field
                del entry["truncated"]
        text = json.dumps(content, indent=1)
        write_atomically(root / METADATA_FILE, text.encode())

    def entries(self) -> list[ShardEntry]:
        """The shards in order."""
        return [self.shards[number] for number in sorted(self.shards, key=int)]

    @property
    def num_samples(self) -> int:
        """Samples that were encoded."""
        return sum(entry.count for entry in self.shards.values())

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of the latents per channel, over all shards."""
        entries = [entry for entry in self.entries() if entry.count]
        count = torch.tensor([entry.count for entry in entries], dtype=torch.float64)[:, None]
        mean = torch.tensor([entry.channel_mean for entry in entries], dtype=torch.float64)
        std = torch.tensor([entry.channel_std for entry in entries], dtype=torch.float64)
        total_mean = (count * mean).sum(0) / count.sum()
        square = (count * (std.square() + mean.square())).sum(0) / count.sum()
        return {"mean": total_mean.tolist(), "std": (square - total_mean.square()).clamp(min=0).sqrt().tolist()}


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


def make_fingerprint(codec: Mapping[str, Any], reader: Mapping[str, Any], *, has_flip: bool) -> dict[str, Any]:
    """Fingerprint of a set of latents, of the codec's and the reader's."""
    return {"codec": dict(codec), **reader, "has_flip": has_flip}


def check_fingerprint(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Refuse latents that were made in another way than the run is configured for.

    Args:
        found: fingerprint of the latents.
        expected: what the run is configured for; fields that it lacks are not compared.
        where: name of the latents for the message.

    Raises:
        ValueError: naming the first field that differs, and both values.
    """
    for name, (theirs, ours) in fingerprint_differences(found, expected).items():
        if name.endswith("_sha256") and name.startswith("names_and"):
            raise ValueError(f"the latents in {where} are of other files, labels or captions: give another folder")
        raise ValueError(
            f"the latents in {where} were made with {name} = {theirs!r}, this run is configured for {ours!r}: "
            "encode again, or configure the run as they were made"
        )


def fingerprint_differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Fields of ``expected`` that differ, by dotted name, as (found, expected)."""
    differences: dict[str, tuple[Any, Any]] = {}
    for name, ours in expected.items():
        theirs = found.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            differences |= fingerprint_differences(theirs, ours, f"{prefix}{name}.")
        elif theirs != ours:
            differences[prefix + name] = (theirs, ours)
    return differences


class StoredLatents(Dataset[Any]):
    """Map-style, memory-mapped latents, without what the model is told beside them: that is up to the subclasses.

    A sample is ``mean + std * noise`` of the image or clip or, half of the time, of its mirror image; flip and noise
    are keyed by (seed, epoch, position in the source), so skipped files change nothing for the others.

    Args:
        root: folder written by ``flexidit encode``.
        expected: fingerprint fields that the latents must have; None accepts any.
        seed: key of the flips and the noise.
        flip: draw flips. If the latents have no mirror images, asking for flips is refused.
        on_error: what to do with shards that are missing or cut and with an encoding that is not complete: leave
            them out and count them, or refuse.

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
        self.report = SkipReport()
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

    @cached_property
    def content(self) -> str:
        """Hash of the shards that are read."""
        read = set(self._files)
        return hash_lines(entry.sha256 for entry in self.metadata.entries() if entry.file in read)

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
                    companions.append(self._read_companions(handle))
                    indices.append(handle.get_tensor("index"))
                    self._files.append(entry.file)
            except (SafetensorError, OSError) as error:
                reason = f"unreadable: {error}"
            except ValueError as error:
                reason = str(error)
            if reason is not None:
                self._handle_damage(entry, reason)
        self._ends = list(accumulate(len(index) for index in indices))
        self.indices = torch.cat([torch.empty(0, dtype=torch.int64), *indices])
        self._set_companions(companions)

    def _handle_damage(self, entry: ShardEntry, reason: str) -> None:
        if self.on_error == "raise":
            raise ValueError(f"shard {entry.file} of {self.root} is damaged ({reason}): {_HINT}")
        self.report.add(entry.file, f"{reason}, {entry.count} samples")

    def _check_readable(self) -> None:
        if not len(self):
            raise ValueError(f"no shard in {self.root} can be read ({self.report.summary('shard')}): encode again")
        if not self.metadata.complete and self.on_error == "raise":
            raise ValueError(f"the encoding in {self.root} was interrupted: {_HINT}")

    def _warn(self) -> None:
        if len(self.report):
            logger.warning("%s: %s", self.root, self.report.summary("shard"))
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
        draw = Draw.of(key)
        return {"x": self._sample(draw), "y": self.labels[draw.sample]}

    def __getitems__(self, keys: Sequence[int | Draw]) -> dict[str, Tensor]:
        """A batch: ``x`` (N, Z, h, w) float32 and ``y`` (N,) int64."""
        draws = [Draw.of(key) for key in keys]
        x = torch.stack([self._sample(draw) for draw in draws])
        return {"x": x, "y": self.labels[[draw.sample for draw in draws]]}

    def _check_kind(self) -> None:
        if "text_encoder" in self.fingerprint:
            raise ValueError(f"the latents in {self.root} have captions and no labels: they are for text-to-image data")

    def _read_companions(self, handle: Any) -> Tensor:
        return handle.get_tensor("label")

    def _set_companions(self, tables: list[Tensor]) -> None:
        self.labels = torch.cat([torch.empty(0, dtype=torch.int64), *tables])
