"""ImageNet, or any labelled images: raw files, webdataset tars, or latents made by ``flexidit encode``.

Shape legend: N batch, C channels and H W size of what the model sees (latents, or pixels).
"""

from typing import Any

from datamodules.file_data import FileDataModule
from datamodules.image_samples import ImageSamples
from flexidit.images import find_images
from flexidit.latent_shards import LatentShards, OnError
from flexidit.latents import CodecDtype
from flexidit.sample_readers import ImageReader


class ImageNetDataModule(FileDataModule):
    """Class-conditional images for training and validation.

    Batches are ``{"x": (N, C, H, W) float32, "y": (N,) int64, "names": N strings}``. What lies at ``train`` decides how
    it is read:

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
        on_error: count and leave out broken images and shards, or refuse the first; also
            what breaks or vanishes during the run, whose place others take.
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
        super().__init__(
            train,
            val,
            reader=ImageReader(image_size),
            batch_size=batch_size,
            num_workers=num_workers,
            vae=vae,
            codec_dtype=codec_dtype,
            flip=flip,
            val_fraction=val_fraction,
            num_train_samples=num_train_samples,
            shuffle_buffer=shuffle_buffer,
            on_error=on_error,
            seed=seed,
        )
        self.image_size, self.num_classes, self.labels = image_size, num_classes, labels

    def open_latents(self, root: str, expected: dict[str, Any], flip: bool) -> LatentShards:
        """Latents with labels."""
        return LatentShards(
            root,
            expected=expected,
            seed=self.seed,
            flip=flip,
            on_error=self.on_error,
            num_classes=self.num_classes,
        )

    def open_files(self, root: str, flip: bool, training: bool) -> ImageSamples:
        """Images with labels."""
        images = find_images(root, self.labels if root == self.train else None, self.num_classes)
        return ImageSamples(images, self.image_size, seed=self.seed, flip=flip, on_error=self.on_error)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Encode raw images on the device they have been moved to; leaves ``x``, ``y`` and ``names``."""
        return self.encoded(batch, batch["y"]) if "index" in batch else batch
