"""scikit-learn's real digits, moving, with captions that are true: text-to-video data that needs no download.

Shape legend: N batch, M all digits, U distinct captions, F frames, S side of the canvas, L caption tokens, E width of
the text encoder.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.captioned_digits import CaptionedDigitsDataModule, in_float32
from datamodules.digits import digit_names
from flexidit.conditions import Captions
from flexidit.digit_captions import NUM_PHRASINGS
from flexidit.digit_images import NATIVE_SIZE
from flexidit.draws import Draw, draw_choice
from flexidit.metrics.moving_digits import moving_digits_in
from flexidit.moving_captions import DIRECTIONS, MovingDigit, moving_captions_of
from flexidit.moving_digits import DIRECTION_NAMES, ClipFormat, MovingDigits, draw_motions

Split: TypeAlias = Literal["train", "val"]


class MovingDigitSamples(Dataset[dict[str, Any]]):
    """Clips that are drawn when they are asked for; a batch is one operation.

    Args:
        digits: what moves.
        captions: U embedded captions.
        rows: (M, 8, K) places among the U of the caption of each digit, direction and phrasing.
        seed: of the movement and the phrasing that a digit has in an epoch.
        single_frames: one frame of each clip, drawn anew in every epoch: images.
    """

    def __init__(
        self, digits: MovingDigits, captions: Captions, rows: Tensor, seed: int = 0, single_frames: bool = False
    ) -> None:
        self.digits, self.captions, self.rows, self.seed = digits, captions, rows, seed
        self.single_frames = single_frames

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        """One sample: ``x`` (1, F, S, S) and ``y``, one caption."""
        batch = self.__getitems__([key])
        return {"x": batch["x"][0], "y": batch["y"]}

    def __getitems__(self, keys: Sequence[int | Draw]) -> dict[str, Any]:
        """A batch: ``x`` (N, 1, F, S, S), or of single frames (N, 1, S, S), ``y``, N captions, and ``names``."""
        draws = [Draw.of(key) for key in keys]
        x, motions = self.digits.clips(self.seed, draws)
        if self.single_frames:
            frames = [draw_choice(self.seed, draw, x.shape[2]) for draw in draws]
            x = torch.from_numpy(x.numpy()[range(len(draws)), :, frames])  # (N, 1, S, S)
        samples = [draw.sample for draw in draws]
        rows = self.rows.numpy()[samples, motions.directions, motions.phrasings]
        embeddings, mask = self.captions.embeddings.numpy()[rows], self.captions.mask.numpy()[rows]
        y = Captions(torch.from_numpy(embeddings), torch.from_numpy(mask))
        return {"x": x, "y": y, "names": digit_names(samples)}


class MovingDigitsDataModule(CaptionedDigitsDataModule):
    """Clips of real handwritten digits in pixel space with true captions.

    Batches are ``{"x": (N, 1, F, S, S), "y": Captions, "names": N strings}``, with values in [-1, 1]. In every epoch
    each digit moves in another way, which is a pure function of (seed, epoch, digit), and its caption is phrased anew;
    validation always sees the same clips. What captions mean stands in :mod:`flexidit.moving_digits`.

    Args:
        canvas_size: S.
        num_frames: F.
        digit_size: side of the digits in pixels; 8 is native, more is upsampled bilinearly.
        batch_size: clips a step and process.
        val_fraction: share of every class that is held out.
        seed: of the split, the order, the movements and the phrasings.
        num_workers: reading processes; a batch of small clips takes some milliseconds, so 0 is enough.
        text_encoder: "words", which needs no weights, or a folder or hub id of a T5.
        caption_length: L, tokens that captions are padded to; no caption of these clips has more than 16 words,
            commas and the end included.
        single_frames: one frame of each clip, drawn anew in every epoch: images (N, 1, S, S) that an image model
            learns from, whose weights then start one of clips.
    """

    def __init__(
        self,
        canvas_size: int = 16,
        num_frames: int = 8,
        digit_size: int = NATIVE_SIZE,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        text_encoder: str = "words",
        caption_length: int = 16,
        single_frames: bool = False,
    ) -> None:
        self.single_frames = single_frames
        self.clip = ClipFormat(canvas_size, num_frames, digit_size)
        super().__init__(digit_size, batch_size, val_fraction, seed, num_workers, text_encoder, caption_length)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(1, F, S, S) of ``x``."""
        return (1, *self.clip.shape[2:]) if self.single_frames else self.clip.shape

    @property
    def resume_settings(self) -> dict[str, Any]:
        clip = {"clip": list(self.clip.shape), "single_frames": self.single_frames}
        return {**super().resume_settings, **clip}

    def make_dataset(self) -> MovingDigitSamples:
        """All digits in motion, with the captions that they can have, each distinct one embedded once.

        Raises:
            ValueError: if a caption does not fit into the caption length.
        """
        self.digits, self.attributes = moving_digits_in(self.clip)
        distinct = sorted(set(self.attributes), key=str)
        texts = [
            text
            for digit in distinct
            for direction in DIRECTION_NAMES
            for text in moving_captions_of(MovingDigit(digit, direction))
        ]
        self._check_length(texts)
        place = {digit: row for row, digit in enumerate(distinct)}
        rows = torch.arange(len(texts)).view(-1, len(DIRECTIONS), NUM_PHRASINGS)
        rows = rows[[place[digit] for digit in self.attributes]]
        captions = in_float32(self.text_encoder.encode(texts))
        return MovingDigitSamples(self.digits, captions, rows, self.seed, self.single_frames)

    def train_images(self) -> tuple[Tensor, Tensor]:
        """Every training digit in its motion of the first epoch, (N, 1, F, S, S), and its class."""
        return self._clips("train")

    def val_images(self) -> tuple[Tensor, Tensor]:
        """The held-out clips, (N, 1, F, S, S), and their classes."""
        return self._clips("val")

    def captions_of(self, split: Split) -> list[tuple[str, ...]]:
        """The three captions of each clip, in the order of :meth:`train_images` or :meth:`val_images`."""
        draws = self._draws(split)
        directions = [DIRECTION_NAMES[place] for place in draw_motions(self.seed, draws, self.clip).directions]
        digits = [self.attributes[draw.sample] for draw in draws]
        return [moving_captions_of(MovingDigit(*moving)) for moving in zip(digits, directions, strict=True)]

    def _clips(self, split: Split) -> tuple[Tensor, Tensor]:
        draws = self._draws(split)
        clips, _ = self.digits.clips(self.seed, draws)
        return clips, self.labels[[draw.sample for draw in draws]]

    def _draws(self, split: Split) -> list[Draw]:
        self.setup()
        indices = {"train": self.train_indices, "val": self.val_indices}[split]
        return [Draw(sample) for sample in indices.tolist()]
