"""ImageNet, or any labelled images: raw files, webdataset tars, or latents made by ``flexidit encode``.

Shape legend: N batch, C channels and H W size of what the model sees (latents, or pixels).
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.image_samples import ImageSamples
from datamodules.loading import (
    ResumableDataModule,
    ResumableLoader,
    check_fraction,
    map_loader,
    ranks_of,
    split_indices,
    stream_loader,
)
from datamodules.tar_samples import TarSamples, count_samples, expand_tars
from flexidit.draws import Draw, draw_noise
from flexidit.images import CROP, find_images
from flexidit.latent_shards import METADATA_FILE, LatentShards, OnError
from flexidit.latents import CodecDtype, LatentCodec, PixelCodec, latent_size
from flexidit.skips import SkipReport

logger = logging.getLogger(__name__)
SourceKind = Literal["latents", "tars", "images"]


@dataclass(frozen=True)
class _Split:
    """One data set and the positions of it that are used; tars have no positions."""

    dataset: Any
    indices: list[int]


def source_kind(source: str | Path) -> SourceKind:
    """What lies at a place: latents (``metadata.json``), tars (a folder of them, or a pattern), or images.

    Raises:
        FileNotFoundError: if nothing is there.
    """
    if str(source).endswith(".tar") or "{" in str(source):
        return "tars"
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data at {source}: give a folder of latents or images, or a pattern of tars")
    if (folder / METADATA_FILE).is_file():
        return "latents"
    return "tars" if any(folder.glob("*.tar")) else "images"


class ImageNetDataModule(ResumableDataModule):
    """Class-conditional images for training and validation.

    Batches are ``{"x": (N, C, H, W) float32, "y": (N,) int64}``. What lies at ``train`` decides how it is read:

    - latents from ``flexidit encode``: ``x`` is resampled from the stored moments in every epoch;
    - a folder of images (one folder a class, or flat with labels.csv): encoded on the fly if ``vae`` is given,
      pixels otherwise. The same seed gives the latents that the stored moments would have given;
    - webdataset tars (``name.jpg``, ``name.cls``): likewise. A resume reads the begun epoch again to its place.

    Lightning's ``use_distributed_sampler`` has no effect: ranks are split by the sampler or by tars.

    Args:
        train: folder or tar pattern of the training data.
        val: the same for validation; None holds out ``val_fraction`` of the training data, which tars cannot.
        image_size: side of the centre crop in pixels; latents must have been made with it.
        num_classes: classes of the model; labels are checked against it.
        batch_size: images a step and process.
        num_workers: reading processes.
        vae: folder or hub id of the VAE. For latents it is only compared with the one that made them; None trusts
            them. For images and tars None means that the model works on pixels.
        codec_dtype: precision of encoding on the fly.
        flip: mirror half of the training images.
        labels: CSV with class_index and file or wnid for ``train``; None looks for labels.csv, then for folders.
        val_fraction: share of ``train`` to hold out if ``val`` is None.
        num_train_samples: images in the training tars; None counts them, which reads all their headers.
        shuffle_buffer: samples held for shuffling a stream of tars.
        on_error: count and leave out broken images and shards, or refuse the first.
        seed: of order, flips, noise and split.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        image_size: int = 256,
        num_classes: int = 1000,
        batch_size: int = 32,
        num_workers: int = 4,
        vae: str | None = None,
        codec_dtype: CodecDtype = "float32",
        flip: bool = True,
        labels: str | None = None,
        val_fraction: float = 0.0,
        num_train_samples: int | None = None,
        shuffle_buffer: int = 1000,
        on_error: OnError = "skip",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_fraction(val_fraction)
        self.train, self.val, self.labels, self.val_fraction = train, val, labels, val_fraction
        self.image_size, self.num_classes, self.flip = image_size, num_classes, flip
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.num_train_samples, self.shuffle_buffer, self.on_error = num_train_samples, shuffle_buffer, on_error
        self.codec = LatentCodec(vae, dtype=codec_dtype) if vae is not None else None
        self._splits: dict[str, _Split] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open and check the data; the same on every rank."""
        if self._splits:
            return
        train = self._open(self.train, training=True)
        size = len(train) if source_kind(self.train) != "tars" else 0
        held_out = self.val_fraction if self.val is None else 0.0
        if held_out and not size:
            raise ValueError("val_fraction cannot hold out samples of a stream of tars: give val, or set it to 0")
        train_indices, val_indices = split_indices(size, held_out, self.seed)
        self._splits["train"] = _Split(train, train_indices)
        if self.val is not None or val_indices:
            val = self._open(self.val or self.train, training=False)
            self._splits["val"] = _Split(val, val_indices or list(range(len(val) if hasattr(val, "__len__") else 0)))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of ``x``."""
        self.setup()
        dataset = self._splits["train"].dataset
        if isinstance(dataset, LatentShards):
            channels, height, width = dataset.shape
            return channels, height, width
        return latent_size(self.codec or PixelCodec(), self.image_size)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """How ``x`` was made: codec, crop and size."""
        self.setup()
        dataset = self._splits["train"].dataset
        if isinstance(dataset, LatentShards):
            return dataset.fingerprint
        codec = self.codec or PixelCodec()
        return {"codec": codec.fingerprint, "image_size": self.image_size, "crop": CROP, "has_flip": self.flip}

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, whole batches only."""
        self.setup()
        return self.resumable(self._loader("train"))

    def val_dataloader(self) -> ResumableLoader | list[object]:
        """Fixed order, no flips, the same noise every time; nothing if there are no validation data."""
        self.setup()
        return self._loader("val") if "val" in self._splits else []

    def skipped(self) -> dict[str, SkipReport]:
        """What was left out so far, by split; samples of tars are named in the log and counted by the data set."""
        reports = {}
        for name, split in self._splits.items():
            if isinstance(split.dataset, LatentShards):
                reports[name] = split.dataset.report
            elif isinstance(split.dataset, ImageSamples):
                reports[name] = split.dataset.report()
        return reports

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Encode raw images on the device they have been moved to; leaves ``x`` and ``y``."""
        if "index" not in batch:
            return batch
        x = batch["x"]
        return {"x": x if self.codec is None else self._encode(self.codec.to(x.device), batch), "y": batch["y"]}

    def teardown(self, stage: str) -> None:
        """Say once what was left out."""
        for name, report in self.skipped().items():
            if len(report):
                logger.warning("%s data: %s", name, report.summary("item"))

    def _encode(self, codec: LatentCodec, batch: dict[str, Tensor]) -> Tensor:
        """Latents with the noise that :class:`LatentShards` draws for the same image and epoch."""
        shape = latent_size(codec, self.image_size)
        draws = zip(batch["index"].tolist(), batch["epoch"].tolist(), strict=True)
        noise = torch.stack([draw_noise(self.seed, Draw(*draw), shape) for draw in draws])
        return codec.encode(batch["x"], None if codec.is_deterministic else noise)

    def _open(self, source: str, training: bool) -> Any:
        kind, flip = source_kind(source), self.flip and training
        if kind == "latents":
            return LatentShards(
                source,
                expected=self._expected(),
                seed=self.seed,
                flip=flip,
                on_error=self.on_error,
                num_classes=self.num_classes,
            )
        if self.codec is not None:
            latent_size(self.codec, self.image_size)  # refuse a size that the VAE does not divide, before reading
        if kind == "tars":
            return self._open_tars(source, training)
        labels = self.labels if source == self.train else None
        images = find_images(source, labels, self.num_classes)
        return ImageSamples(images, self.image_size, seed=self.seed, flip=flip, on_error=self.on_error)

    def _open_tars(self, source: str, training: bool) -> TarSamples:
        tars = expand_tars(source)
        rank, world_size = ranks_of(self.trainer)
        known = self.num_train_samples if training else 0
        return TarSamples(
            tars,
            self.image_size,
            num_samples=known if known is not None else count_samples(tars),
            batch_size=self.batch_size,
            training=training,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            flip=self.flip,
            shuffle_buffer=self.shuffle_buffer,
            num_classes=self.num_classes,
            on_error=self.on_error,
        )

    def _expected(self) -> dict[str, Any]:
        """What stored latents must agree with."""
        expected: dict[str, Any] = {"image_size": self.image_size, "crop": CROP}
        return expected | ({"codec": self.codec.fingerprint} if self.codec is not None else {})

    def _loader(self, name: str) -> ResumableLoader:
        split, training = self._splits[name], name == "train"
        if isinstance(split.dataset, TarSamples):
            return stream_loader(split.dataset, self.batch_size, self.num_workers)
        return map_loader(
            split.dataset,
            split.indices,
            batch_size=self.batch_size,
            training=training,
            trainer=self.trainer,
            seed=self.seed,
            num_workers=self.num_workers,
        )
