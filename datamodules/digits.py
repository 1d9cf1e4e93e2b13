"""scikit-learn's 1,797 real handwritten digits: class-conditional data that needs no download.

Shape legend: N batch, S side of the image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import ResumableDataModule, ResumableLoader, check_fraction, map_loader
from flexidit.digit_images import NATIVE_SIZE, NUM_CLASSES, load_digit_images
from flexidit.draws import Draw
from flexidit.latents import PixelCodec


class TensorSamples(Dataset[dict[str, Any]]):
    """Images and labels in memory; a batch is one indexing operation.

    Args:
        x: (M, C, S, S) images.
        y: (M,) labels.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        """One sample: ``x`` (C, S, S) and ``y`` ()."""
        index = Draw.of(key).sample
        return {"x": self.x[index], "y": self.y[index]}

    def __getitems__(self, keys: Sequence[int | Draw]) -> dict[str, Any]:
        """A batch: ``x`` (N, C, S, S), ``y`` (N,) and ``names``."""
        index = [Draw.of(key).sample for key in keys]
        # NumPy copies on this thread; torch would wake its thread pool, which stalls where cores are oversubscribed
        x, y = torch.from_numpy(self.x.numpy()[index]), torch.from_numpy(self.y.numpy()[index])
        return {"x": x, "y": y, "names": digit_names(index)}


def digit_names(indices: Sequence[int]) -> list[str]:
    """What digits are called where a batch must be told from others."""
    return [f"digit {index}" for index in indices]


def stratified_split(y: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(train, val) positions, ascending, with the same share of every class in each; pure."""
    generator = torch.Generator().manual_seed(seed)
    train, val = [], []
    for label in y.unique():
        members = (y == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        num_val = round(len(members) * val_fraction)
        val.append(members[:num_val])
        train.append(members[num_val:])
    return torch.cat(train).sort().values, torch.cat(val).sort().values


class DigitsDataModule(ResumableDataModule):
    """Real handwritten digits in pixel space: one channel in [-1, 1], labels 0 to 9, no flips (2 and 5 would suffer).

    Batches are ``{"x": (N, 1, S, S), "y": (N,), "names": N strings}``.

    Args:
        size: side of the images in pixels; 8 is native, more is upsampled bilinearly.
        batch_size: images a step and process.
        val_fraction: share of every class that is held out.
        seed: of the split and the order.
        num_workers: reading processes; the data lie in memory, so 0 is enough.
    """

    num_classes = NUM_CLASSES

    def __init__(
        self,
        size: int = NATIVE_SIZE,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_fraction(val_fraction)
        self.size, self.batch_size, self.val_fraction = size, batch_size, val_fraction
        self.seed, self.num_workers = seed, num_workers
        self.codec = PixelCodec(channels=1)
        self.dataset: Dataset[Any] | None = None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, S, S) of ``x``."""
        return 1, self.size, self.size

    @property
    def resume_settings(self) -> dict[str, Any]:
        names = ("size", "val_fraction", "seed", "batch_size")
        return {**super().resume_settings, **{name: getattr(self, name) for name in names}}

    def setup(self, stage: str | None = None) -> None:
        """Load and split; the same on every rank."""
        if self.dataset is None:
            self.images, self.labels = load_digit_images(self.size)
            self.train_indices, self.val_indices = stratified_split(self.labels, self.val_fraction, self.seed)
            self.dataset = self.make_dataset()

    def make_dataset(self) -> Dataset[Any]:
        """What batches are read from: ``images`` and ``labels`` of all digits, which are there."""
        return TensorSamples(self.images, self.labels)

    def train_images(self) -> tuple[Tensor, Tensor]:
        """All training images and labels, for statistics and classifiers."""
        self.setup()
        return self.images[self.train_indices], self.labels[self.train_indices]

    def val_images(self) -> tuple[Tensor, Tensor]:
        """All held-out images and labels."""
        self.setup()
        return self.images[self.val_indices], self.labels[self.val_indices]

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, whole batches only."""
        self.setup()
        return self.resumable(self._loader(self.train_indices, training=True))

    def val_dataloader(self) -> ResumableLoader | list[object]:
        """Fixed order, everything; nothing without held-out images."""
        self.setup()
        return self._loader(self.val_indices, training=False) if len(self.val_indices) else []

    def _loader(self, indices: Tensor, training: bool) -> ResumableLoader:
        assert self.dataset is not None
        return map_loader(
            self.dataset,
            indices.tolist(),
            batch_size=self.batch_size,
            training=training,
            trainer=self.trainer,
            seed=self.seed,
            num_workers=self.num_workers,
        )
