"""Writing latents: images through a VAE into shards, resumable at the last finished shard.

Shape legend: N images of a chunk, Z latent channels, h w latent height and width.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flexidit.files import write_atomically
from flexidit.images import CROP, BrokenImageError, ImageIndex, read_pixels
from flexidit.latent_shards import (
    METADATA_FILE,
    Metadata,
    ShardEntry,
    check_fingerprint,
    make_fingerprint,
    sha256_of,
)
from flexidit.latents import CodecDtype, LatentCodec, latent_size
from flexidit.skips import Skip, SkipReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeSettings:
    """How images become shards."""

    image_size: int = 256
    """Side of the square crop, pixels."""
    shard_size: int = 256
    """Images of a shard: what an interruption can lose."""
    batch_size: int = 16
    """Images that are encoded at once."""
    dtype: CodecDtype = "float16"
    """Precision on disk."""
    flip: bool = True
    """Encode the mirror images too."""
    num_workers: int = 0
    """Processes that read images; 0 reads in this one."""

    def __post_init__(self) -> None:
        for name in ("image_size", "shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype is float32, float16 or bfloat16, got {self.dtype!r}")


@dataclass
class EncodeResult:
    """What an encoding did."""

    metadata: Metadata
    encoded: int
    """Images encoded by this run."""
    kept: int
    """Images that an earlier, interrupted run had encoded."""
    skips: SkipReport
    """Images that could not be used, of all runs."""


@dataclass
class _Rows:
    """Rows of the shard that is being filled."""

    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    records: list[dict[str, object]] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        self.parts.setdefault(name, []).append(value)

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


class _Reader(Dataset[tuple[int, "Tensor | str"]]):
    """``(position, pixels)`` of an image, or ``(position, reason)`` if it is broken."""

    def __init__(self, images: ImageIndex, positions: Sequence[int], size: int) -> None:
        self.images, self.positions, self.size = images, positions, size

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> tuple[int, "Tensor | str"]:
        position = self.positions[item]
        try:
            return position, read_pixels(self.images.path(position), self.size)
        except BrokenImageError as error:
            return position, str(error)


def encode_images(
    images: ImageIndex,
    codec: LatentCodec,
    out: str | Path,
    settings: EncodeSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodeResult:
    """Encode labelled images into shards of latents.

    Shard k holds the images k * shard_size onward of the index, so an interrupted run continues with the shards
    that are not there, and ends with the same files as an uninterrupted one. Broken images are counted and left out.

    Args:
        images: what to encode.
        codec: the VAE.
        out: folder to write; created if it is missing.
        settings: sizes and precision.
        on_progress: called with (images done, images in total).

    Raises:
        ValueError: if the folder holds latents made in another way, or every image is broken.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    metadata = _open_metadata(images, codec, out, settings)
    pending = _pending_shards(metadata, images, out, settings)
    kept, done = metadata.num_samples, len(images) - sum(len(positions) for positions in pending.values())
    report = on_progress or (lambda done, total: None)
    report(done, len(images))
    reader = _read(images, [p for positions in pending.values() for p in positions], settings)
    for number, positions in pending.items():
        rows = _Rows()
        for _ in range(0, len(positions), settings.batch_size):
            chunk = next(reader)
            _encode_chunk(chunk, images, codec, settings, rows)
            done += len(chunk)
            report(done, len(images))
        metadata.shards[str(number)] = _write_shard(out, number, rows)
        metadata.save(out)
    return _finish(metadata, images, out, kept)


def _open_metadata(images: ImageIndex, codec: LatentCodec, out: Path, settings: EncodeSettings) -> Metadata:
    """Metadata of the folder if it is of the same work, else new."""
    fingerprint = make_fingerprint(codec.fingerprint, image_size=settings.image_size, crop=CROP, has_flip=settings.flip)
    fresh = Metadata(fingerprint, _source(images, settings), list(latent_size(codec, settings.image_size)))
    if not (out / METADATA_FILE).is_file():
        return fresh
    found = Metadata.load(out)
    check_fingerprint(found.fingerprint, fresh.fingerprint, str(out))
    check_fingerprint(found.source, fresh.source, str(out))
    return found


def _source(images: ImageIndex, settings: EncodeSettings) -> dict[str, object]:
    digest = hashlib.sha256()
    for file, label in zip(images.files, images.labels, strict=True):
        digest.update(f"{file}\t{label}\n".encode())
    return {
        "num_images": len(images),
        "names_and_labels_sha256": digest.hexdigest(),
        "shard_size": settings.shard_size,
        "dtype": settings.dtype,
    }


def _pending_shards(metadata: Metadata, images: ImageIndex, out: Path, settings: EncodeSettings) -> dict[int, range]:
    """Positions of the shards that are not there, complete and intact; forgets damaged ones."""
    pending = {}
    for number, start in enumerate(range(0, len(images), settings.shard_size)):
        entry = metadata.shards.get(str(number))
        damage = entry and (entry.damage(out) or _altered(out, entry))
        if damage and entry:
            logger.warning("%s is encoded again: %s", entry.file, damage)
            del metadata.shards[str(number)]
        if entry is None or damage:
            pending[number] = range(start, min(start + settings.shard_size, len(images)))
    return pending


def _altered(out: Path, entry: ShardEntry) -> str | None:
    return None if sha256_of(out / entry.file) == entry.sha256 else "its content has changed"


def _read(images: ImageIndex, positions: Sequence[int], settings: EncodeSettings) -> Iterator[list]:
    """Chunks of ``batch_size`` images that do not cross shards, read ahead by the workers."""
    batches: list[list[int]] = []
    for item, position in enumerate(positions):
        starts_shard = position % settings.shard_size == 0
        if not batches or starts_shard or len(batches[-1]) == settings.batch_size:
            batches.append([])
        batches[-1].append(item)
    reader = _Reader(images, positions, settings.image_size)
    return iter(DataLoader(reader, batch_sampler=batches, num_workers=settings.num_workers, collate_fn=list))


def _encode_chunk(
    chunk: list[tuple[int, Tensor | str]], images: ImageIndex, codec: LatentCodec, settings: EncodeSettings, rows: _Rows
) -> None:
    good = [(position, content) for position, content in chunk if isinstance(content, Tensor)]
    rows.skipped += [Skip(images.files[p], content) for p, content in chunk if isinstance(content, str)]
    if not good:
        return
    pixels = torch.stack([content for _, content in good])
    dtype: torch.dtype = getattr(torch, settings.dtype)
    for suffix, view in (("", pixels), *((("_flip", pixels.flip(-1)),) if settings.flip else ())):
        moments = codec.encode_moments(view)
        rows.add("mean" + suffix, moments.mean.to(dtype))
        if not codec.is_deterministic:
            rows.add("std" + suffix, moments.std.to(dtype))
    positions = [position for position, _ in good]
    rows.add("index", torch.tensor(positions))
    rows.add("label", torch.tensor([images.labels[p] for p in positions]))
    rows.records += [{"index": p, "file": images.files[p], "label": images.labels[p]} for p in positions]


def _write_shard(out: Path, number: int, rows: _Rows) -> ShardEntry:
    """Names first, tensors last: a shard that is there is complete."""
    name = f"shard-{number:05d}"
    tensors = rows.tensors()
    count = len(rows.records)
    data = save(tensors)
    lines = "".join(json.dumps(record) + "\n" for record in rows.records)
    write_atomically(out / f"{name}.jsonl", lines.encode())
    write_atomically(out / f"{name}.safetensors", data)
    mean, std = _channel_statistics(tensors) if count else ([], [])
    skipped = [skip.as_dict() for skip in rows.skipped]
    return ShardEntry(f"{name}.safetensors", count, len(data), hashlib.sha256(data).hexdigest(), mean, std, skipped)


def _channel_statistics(tensors: dict[str, Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of ``mean + std * noise``: the variances add up."""
    mean = tensors["mean"].double()
    variance = mean.var(dim=(0, 2, 3), correction=0)
    if "std" in tensors:
        variance = variance + tensors["std"].double().square().mean(dim=(0, 2, 3))
    return mean.mean(dim=(0, 2, 3)).tolist(), variance.sqrt().tolist()


def _finish(metadata: Metadata, images: ImageIndex, out: Path, kept: int) -> EncodeResult:
    skips = SkipReport(list(images.skips))
    skips.extend(Skip(item["file"], item["reason"]) for entry in metadata.entries() for item in entry.skipped)
    if not metadata.num_samples:
        raise ValueError(f"none of the {len(images)} images could be read ({skips.summary('image')})")
    metadata.complete = True
    metadata.save(out)
    return EncodeResult(metadata, metadata.num_samples - kept, kept, skips)
