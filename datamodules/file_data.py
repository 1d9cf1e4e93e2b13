"""What data modules over images and clips share: telling sources apart, splits, loaders, the VAE, what was left out.

Shape legend: N batch, C channels, F frames of clips and H W size of what the model sees (latents, or pixels).
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.loading import (
    ResumableDataModule,
    ResumableLoader,
    check_fraction,
    map_loader,
    ranks_of,
    split_indices,
    stream_loader,
)
from datamodules.tar_samples import TarSamples, TarTarget, count_samples, expand_tars
from flexidit.draws import Draw, draw_noise
from flexidit.fingerprints import make_fingerprint
from flexidit.latent_metadata import METADATA_FILE
from flexidit.latent_shards import OnError
from flexidit.latents import CodecDtype, LatentCodec, PixelCodec
from flexidit.sample_readers import SampleReader
from flexidit.skips import SkipReport

logger = logging.getLogger(__name__)
SourceKind = Literal["latents", "tars", "files"]


@dataclass(frozen=True)
class Split:
    """One data set, what it reads, and the positions of it that are used; tars have no positions."""

    dataset: Any
    kind: SourceKind
    indices: list[int]


def source_kind(source: str | Path) -> SourceKind:
    """What lies at a place: latents (``metadata.json``), tars (a folder of them, or a pattern), or files.

    Raises:
        FileNotFoundError: if nothing is there.
    """
    if str(source).endswith(".tar") or "{" in str(source):
        return "tars"
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data at {source}: give a folder of latents or files, or a pattern of tars")
    if (folder / METADATA_FILE).is_file():
        return "latents"
    return "tars" if any(folder.glob("*.tar")) else "files"


class FileDataModule(ResumableDataModule, ABC):
    """Images or clips with something that belongs to them: latents, raw files or tars, for training and validation.

    Subclasses say how latents and files are opened, and what tars hold; they explain the arguments.
    """

    tar_target: TarTarget = "label"
    num_classes: int | None = None
    """What labels are checked against; None where there are no labels."""

    def __init__(
        self,
        train: str,
        val: str | None,
        *,
        reader: SampleReader,
        batch_size: int,
        num_workers: int,
        vae: str | None,
        codec_dtype: CodecDtype,
        flip: bool,
        val_fraction: float,
        num_train_samples: int | None,
        shuffle_buffer: int,
        on_error: OnError,
        seed: int,
    ) -> None:
        super().__init__()
        check_fraction(val_fraction)
        self.train, self.val, self.val_fraction = train, val, val_fraction
        self.reader, self.flip = reader, flip
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.num_train_samples, self.shuffle_buffer, self.on_error = num_train_samples, shuffle_buffer, on_error
        self.codec = LatentCodec(vae, dtype=codec_dtype) if vae is not None else None
        self._splits: dict[str, Split] = {}

    @abstractmethod
    def open_latents(self, root: str, expected: dict[str, Any], flip: bool) -> Any:
        """Reader of a folder of latents: map-style, with ``shape``, ``fingerprint`` and ``report``."""

    @abstractmethod
    def open_files(self, root: str, flip: bool, training: bool) -> Any:
        """Reader of a folder of files: map-style, batches have ``index`` and ``epoch``; with ``report()``."""

    def reader_for(self, training: bool) -> SampleReader:
        """What is read of a file: the same for training and validation, if subclasses do not say otherwise."""
        return self.reader

    def check_raw(self) -> None:
        """Refuse what raw files could not be encoded with, before any is read."""
        if self.codec is not None:
            self.reader.latent_size(self.codec)

    def expected(self) -> dict[str, Any]:
        """Fields of the fingerprint that stored latents must agree with."""
        return self.reader.fingerprint | ({"codec": self.codec.fingerprint} if self.codec is not None else {})

    def setup(self, stage: str | None = None) -> None:
        """Open and check the data; the same on every rank."""
        if self._splits:
            return
        train, kind = self._open(self.train, training=True)
        size = len(train) if kind != "tars" else 0
        held_out = self.val_fraction if self.val is None else 0.0
        if held_out and not size:
            raise ValueError("val_fraction cannot hold out samples of a stream of tars: give val, or set it to 0")
        train_indices, val_indices = split_indices(size, held_out, self.seed)
        splits = {"train": Split(train, kind, train_indices)}
        if self.val is not None or val_indices:
            val, kind = self._open(self.val or self.train, training=False)
            everything = list(range(len(val))) if kind != "tars" else []
            splits["val"] = Split(val, kind, val_indices or everything)
        self._splits = splits

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of ``x``, or (C, F, H, W) of clips."""
        split = self.split("train")
        return split.dataset.shape if split.kind == "latents" else self.reader.latent_size(self.codec or PixelCodec())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """How the batches were made: codec, crop and size."""
        split = self.split("train")
        if split.kind == "latents":
            return split.dataset.fingerprint
        codec = self.codec or PixelCodec()
        return make_fingerprint(codec.fingerprint, self.reader.fingerprint, has_flip=self.flip)

    @property
    def resume_settings(self) -> dict[str, Any]:
        split, names = self.split("train"), ("flip", "val_fraction", "seed", "batch_size")
        common = {"fingerprint": self.fingerprint, **{name: getattr(self, name) for name in names}}
        return {**super().resume_settings, **common, "content": split.dataset.content, **self._order_of(split)}

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, whole batches only."""
        return self.resumable(self._loader("train"))

    def val_dataloader(self) -> ResumableLoader | list[object]:
        """Fixed order, no flips, the same draws every time; nothing if there are no validation data."""
        self.setup()
        return self._loader("val") if "val" in self._splits else []

    def skipped(self) -> dict[str, SkipReport]:
        """What was left out so far, by split."""
        datasets = {name: split.dataset for name, split in self._splits.items()}
        return {
            name: dataset.report if isinstance(dataset.report, SkipReport) else dataset.report()
            for name, dataset in datasets.items()
        }

    def teardown(self, stage: str) -> None:
        """Say once what was left out."""
        for name, report in self.skipped().items():
            if len(report):
                logger.warning("%s data: %s", name, report.summary("item"))

    def encode_samples(self, batch: dict[str, Any]) -> Tensor:
        """``x`` for the model, on the device of the batch, with the noise that stored latents have in this epoch."""
        pixels = batch["x"]
        if self.codec is None:
            return pixels
        codec = self.codec.to(pixels.device)
        if codec.is_deterministic:
            return codec.encode(pixels)
        shape = self.reader.latent_size(codec)
        draws = zip(batch["index"].tolist(), batch["epoch"].tolist(), strict=True)
        return codec.encode(pixels, torch.stack([draw_noise(self.seed, Draw(*draw), shape) for draw in draws]))

    def encoded(self, batch: dict[str, Any], y: Any) -> dict[str, Any]:
        """What is left of a raw batch for the model: ``x``, ``y``, ``names`` and, if it is so, ``repeated``."""
        kept: dict[str, Any] = {name: batch[name] for name in ("names", "repeated") if name in batch}
        return {"x": self.encode_samples(batch), "y": y, **kept}

    def split(self, name: str) -> Split:
        """The opened data of "train" or "val"."""
        self.setup()
        return self._splits[name]

    def _open(self, source: str, training: bool) -> tuple[Any, SourceKind]:
        kind, flip = source_kind(source), self.flip and training
        if kind == "latents":
            return self.open_latents(source, self.expected(), flip), kind
        self.check_raw()
        return (self._open_tars(source, training) if kind == "tars" else self.open_files(source, flip, training)), kind

    def _open_tars(self, source: str, training: bool) -> TarSamples:
        tars = expand_tars(source)
        rank, world_size = ranks_of(self.trainer)
        known = self.num_train_samples if training else 0
        return TarSamples(
            tars,
            self.reader_for(training),
            target=self.tar_target,
            num_samples=known if known is not None else count_samples(tars, self.tar_target),
            batch_size=self.batch_size,
            training=training,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            flip=self.flip,
            shuffle_buffer=self.shuffle_buffer,
            on_error=self.on_error,
            num_classes=self.num_classes,
        )

    def _order_of(self, split: Split) -> dict[str, Any]:
        """What the order depends on beside the seed: of a stream on who reads it, too."""
        if split.kind != "tars":
            return {"samples": len(split.indices)}
        readers = {"processes": split.dataset.num_replicas, "num_workers": self.num_workers}
        return {"samples": split.dataset.size, "shuffle_buffer": self.shuffle_buffer, **readers}

    def _loader(self, name: str) -> ResumableLoader:
        split = self.split(name)
        if split.kind == "tars":
            return stream_loader(split.dataset, self.batch_size, self.num_workers)
        return map_loader(
            split.dataset,
            split.indices,
            batch_size=self.batch_size,
            training=name == "train",
            trainer=self.trainer,
            seed=self.seed,
            num_workers=self.num_workers,
        )
