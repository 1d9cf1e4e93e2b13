"""Writing latents: images or clips through a VAE into shards, resumable at the last finished shard.

Samples are images or clips: what is said of (N, C, H, W) holds of (N, C, F, H, W).

Shape legend: N samples of a chunk, C channels, F frames, H W height and width, Z latent channels, h w latent height
and width.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flexidit.files import write_atomically
from flexidit.fingerprints import check_fingerprint, make_fingerprint
from flexidit.images import ImageIndex
from flexidit.latent_metadata import METADATA_FILE, Metadata, ShardEntry
from flexidit.latent_shards import hash_lines, sha256_of
from flexidit.latents import Codec, CodecDtype
from flexidit.sample_readers import ImageReader, SampleReader
from flexidit.skips import BrokenFileError, Skip, SkipReport

logger = logging.getLogger(__name__)
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class EncodeSettings:
    """How files become shards."""

    reader: SampleReader = field(default_factory=ImageReader)
    """Whether files are images or clips, and what is read of them."""
    shard_size: int = 256
    """Samples of a shard: what an interruption can lose."""
    batch_size: int = 16
    """Samples that are encoded at once."""
    dtype: CodecDtype = "float16"
    """Precision on disk."""
    flip: bool = True
    """Encode the mirror images too."""
    num_workers: int = 0
    """Processes that read files; 0 reads in this one."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype is float32, float16 or bfloat16, got {self.dtype!r}")


@dataclass
class EncodeResult:
    """What an encoding did."""

    metadata: Metadata
    encoded: int
    """Samples encoded by this run."""
    kept: int
    """Samples that an earlier, interrupted run had encoded."""
    skips: SkipReport
    """Files that could not be used, of all runs."""
    truncated: SkipReport
    """Captions that lost their ends, of all runs; labels have none."""


class SampleSource(Protocol):
    """A list of files that know what they are: :class:`ImageIndex`, or one of images or clips with captions."""

    @property
    def files(self) -> list[str]:
        """Names, in a fixed order."""

    @property
    def skips(self) -> SkipReport:
        """What was left out when they were listed."""

    def path(self, index: int) -> Path:
        """Where one file lies."""

    def __len__(self) -> int: ...


@dataclass
class CompanionRows:
    """What stands beside the latents of a few samples."""

    tensors: dict[str, Tensor]
    """Tables, each of which grows along its first axis."""
    records: list[dict[str, Any]]
    """For the names beside the shard, one a sample."""
    truncated: list[Skip] = field(default_factory=list)


class Companions(Protocol):
    """What a model is told beside the samples, and shards hold beside the latents: labels, or embedded captions."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Added to that of the latents."""

    @property
    def source(self) -> dict[str, Any]:
        """What identifies the work beside sizes, for continuing it."""

    @property
    def header(self) -> dict[str, str] | None:
        """Written into every shard."""

    def begin(self, out: Path) -> None:
        """Write what the folder needs once."""

    def rows(self, positions: Sequence[int]) -> CompanionRows:
        """Those of some samples."""


class Labels:
    """Companions of class-conditional data: one whole number an image."""

    header = None

    def __init__(self, images: ImageIndex) -> None:
        self.images = images

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Nothing: labels are what they are."""
        return {}

    @property
    def source(self) -> dict[str, Any]:
        """Names and labels, hashed."""
        lines = (f"{file}\t{label}" for file, label in zip(self.images.files, self.images.labels, strict=True))
        return {"names_and_labels_sha256": hash_lines(lines)}

    def begin(self, out: Path) -> None:
        """Nothing to write."""

    def rows(self, positions: Sequence[int]) -> CompanionRows:
        """``label`` (N,) int64."""
        labels = [self.images.labels[p] for p in positions]
        return CompanionRows({"label": torch.tensor(labels)}, [{"label": label} for label in labels])


@dataclass
class _Rows:
    """Rows of the shard that is being filled."""

    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    records: list[dict[str, object]] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    truncated: list[Skip] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        self.parts.setdefault(name, []).append(value)

    def add_companions(self, rows: CompanionRows, records: list[dict[str, Any]]) -> None:
        for name, value in rows.tensors.items():
            self.add(name, value)
        self.records += records
        self.truncated += rows.truncated

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


class _Samples(Dataset[tuple[int, "Tensor | str"]]):
    """``(position, pixels)`` of a file, or ``(position, reason)`` if it is broken."""

    def __init__(self, source: SampleSource, positions: Sequence[int], reader: SampleReader) -> None:
        self.source, self.positions, self.reader = source, positions, reader

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> tuple[int, "Tensor | str"]:
        position = self.positions[item]
        try:
            return position, self.reader.read(self.source.path(position))
        except BrokenFileError as error:
            return position, str(error)


def encode_images(
    images: ImageIndex,
    codec: Codec,
    out: str | Path,
    settings: EncodeSettings,
    on_progress: OnProgress | None = None,
) -> EncodeResult:
    """Encode labelled images into shards of latents, as :func:`encode_with` does.

    Raises:
        ValueError: if the folder holds latents made in another way, or every image is broken.
    """
    return encode_with(Labels(images), images, codec, out, settings, on_progress)


def encode_with(
    companions: Companions,
    source: SampleSource,
    codec: Codec,
    out: str | Path,
    settings: EncodeSettings,
    on_progress: OnProgress | None = None,
) -> EncodeResult:
    """Encode images or clips into shards of latents, with their labels or captions.

    Shard k holds the samples k * shard_size onward of the source, so an interrupted run continues with the shards
    that are not there, and ends with the same files as an uninterrupted one. Broken files are counted and left out.

    Args:
        companions: labels or captions of the samples.
        source: what to encode.
        codec: the VAE, or pixels as they are.
        out: folder to write; created if it is missing.
        settings: how files are read, sizes and precision.
        on_progress: called with (samples done, samples in total).

    Raises:
        ValueError: if the folder holds latents made in another way, or every file is broken.
    """
    job = _Job(companions, source, codec, Path(out), settings)
    job.out.mkdir(parents=True, exist_ok=True)
    metadata = _open_metadata(job)
    companions.begin(job.out)
    pending = _pending_shards(job, metadata)
    kept, done = metadata.num_samples, len(source) - sum(len(positions) for positions in pending.values())
    report = on_progress or (lambda done, total: None)
    report(done, len(source))
    reader = _read(job, [p for positions in pending.values() for p in positions])
    for number, positions in pending.items():
        rows = _Rows()
        for _ in range(0, len(positions), settings.batch_size):
            chunk = next(reader)
            _encode_chunk(job, chunk, rows)
            done += len(chunk)
            report(done, len(source))
        metadata.shards[str(number)] = _write_shard(job, number, rows)
        metadata.save(job.out)
    return _finish(job, metadata, kept)


@dataclass(frozen=True)
class _Job:
    """What to encode, how, and where to."""

    companions: Companions
    source: SampleSource
    codec: Codec
    out: Path
    settings: EncodeSettings


def _open_metadata(job: _Job) -> Metadata:
    """Metadata of the folder if it is of the same work, else new."""
    settings = job.settings
    reader = settings.reader
    shape = reader.latent_size(job.codec)
    fingerprint = make_fingerprint(job.codec.fingerprint, reader.fingerprint, has_flip=settings.flip)
    source = {f"num_{reader.noun}s": len(job.source), **job.companions.source}
    source |= {"shard_size": settings.shard_size, "dtype": settings.dtype}
    fresh = Metadata(fingerprint | job.companions.fingerprint, source, list(shape))
    if not (job.out / METADATA_FILE).is_file():
        return fresh
    found = Metadata.load(job.out)
    check_fingerprint(found.fingerprint, fresh.fingerprint, str(job.out))
    check_fingerprint(found.source, fresh.source, str(job.out))
    return found


def _pending_shards(job: _Job, metadata: Metadata) -> dict[int, range]:
    """Positions of the shards that are not there, complete and intact; forgets damaged ones."""
    pending, size, total = {}, job.settings.shard_size, len(job.source)
    for number, start in enumerate(range(0, total, size)):
        entry = metadata.shards.get(str(number))
        damage = entry and (entry.damage(job.out) or _altered(job.out, entry))
        if damage and entry:
            logger.warning("%s is encoded again: %s", entry.file, damage)
            del metadata.shards[str(number)]
        if entry is None or damage:
            pending[number] = range(start, min(start + size, total))
    return pending


def _altered(out: Path, entry: ShardEntry) -> str | None:
    return None if sha256_of(out / entry.file) == entry.sha256 else "its content has changed"


def _read(job: _Job, positions: Sequence[int]) -> Iterator[list]:
    """Chunks of ``batch_size`` samples that do not cross shards, read ahead by the workers."""
    batches: list[list[int]] = []
    for item, position in enumerate(positions):
        starts_shard = position % job.settings.shard_size == 0
        if not batches or starts_shard or len(batches[-1]) == job.settings.batch_size:
            batches.append([])
        batches[-1].append(item)
    samples = _Samples(job.source, positions, job.settings.reader)
    if job.settings.num_workers:
        gc.collect()  # left to a forked worker, a video encoder in a cycle waits for ever for threads it lost
    return iter(DataLoader(samples, batch_sampler=batches, num_workers=job.settings.num_workers, collate_fn=list))


def _encode_chunk(job: _Job, chunk: list[tuple[int, Tensor | str]], rows: _Rows) -> None:
    names = job.source.files
    good = [(position, content) for position, content in chunk if isinstance(content, Tensor)]
    rows.skipped += [Skip(names[p], content) for p, content in chunk if isinstance(content, str)]
    if not good:
        return
    _encode_pixels(job, torch.stack([content for _, content in good]), rows)
    positions = [position for position, _ in good]
    rows.add("index", torch.tensor(positions))
    beside = job.companions.rows(positions)
    named = zip(positions, beside.records, strict=True)
    rows.add_companions(beside, [{"index": p, "file": names[p], **record} for p, record in named])


def _encode_pixels(job: _Job, pixels: Tensor, rows: _Rows) -> None:
    """Moments of samples and, if asked for, of their mirror images: (N, C, H, W) -> (N, Z, h, w)."""
    dtype: torch.dtype = getattr(torch, job.settings.dtype)
    for suffix, view in (("", pixels), *((("_flip", pixels.flip(-1)),) if job.settings.flip else ())):
        moments = job.codec.encode_moments(view)
        rows.add("mean" + suffix, moments.mean.to(dtype))
        if not job.codec.is_deterministic:
            rows.add("std" + suffix, moments.std.to(dtype))


def _write_shard(job: _Job, number: int, rows: _Rows) -> ShardEntry:
    """Names first, tensors last: a shard that is there is complete."""
    name = f"shard-{number:05d}"
    tensors = rows.tensors()
    count = len(rows.records)
    data = save(tensors, job.companions.header)
    lines = "".join(json.dumps(record) + "\n" for record in rows.records)
    write_atomically(job.out / f"{name}.jsonl", lines.encode())
    write_atomically(job.out / f"{name}.safetensors", data)
    mean, std = _channel_statistics(tensors) if count else ([], [])
    skipped, truncated = ([skip.as_dict() for skip in skips] for skips in (rows.skipped, rows.truncated))
    digest = hashlib.sha256(data).hexdigest()
    return ShardEntry(f"{name}.safetensors", count, len(data), digest, mean, std, skipped, truncated)


def _channel_statistics(tensors: dict[str, Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of ``mean + std * noise``: the variances add up."""
    mean = tensors["mean"].double()
    others = [dim for dim in range(mean.ndim) if dim != 1]
    variance = mean.var(dim=others, correction=0)
    if "std" in tensors:
        variance = variance + tensors["std"].double().square().mean(dim=others)
    return mean.mean(dim=others).tolist(), variance.sqrt().tolist()


def _finish(job: _Job, metadata: Metadata, kept: int) -> EncodeResult:
    skips, truncated = SkipReport(list(job.source.skips)), SkipReport()
    for entry in metadata.entries():
        skips.extend(Skip(item["file"], item["reason"]) for item in entry.skipped)
        truncated.extend(Skip(item["file"], item["reason"]) for item in entry.truncated)
    if not metadata.num_samples:
        noun = job.settings.reader.noun
        raise ValueError(f"none of the {len(job.source)} {noun}s could be read ({skips.summary(noun)})")
    metadata.complete = True
    metadata.save(job.out)
    return EncodeResult(metadata, metadata.num_samples - kept, kept, skips, truncated)
