"""scikit-learn's real digits with captions that are true: text-to-image data that needs no download.

Shape legend: N batch, M all digits, K phrasings of a caption, U distinct captions, S side of the image, L caption
tokens, E width of the text encoder.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.digits import DigitsDataModule, digit_names
from flexidit.conditions import Captions
from flexidit.digit_images import NATIVE_SIZE
from flexidit.draws import Draw, draw_choice
from flexidit.metrics.digit_attributes import real_captions
from flexidit.text import make_text_encoder


class CaptionedDigits(Dataset[dict[str, Any]]):
    """Images and embedded captions in memory; a batch is one indexing operation.

    Args:
        x: (M, 1, S, S) images.
        captions: U embedded captions.
        choices: (M, K) places of the captions of each image among the U.
        seed: of the caption that an image has in an epoch.
    """

    def __init__(self, x: Tensor, captions: Captions, choices: Tensor, seed: int = 0) -> None:
        self.x, self.captions, self.choices, self.seed = x, captions, choices, seed

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        """One sample: ``x`` (1, S, S) and ``y``, one caption."""
        batch = self.__getitems__([key])
        return {"x": batch["x"][0], "y": batch["y"]}

    def __getitems__(self, keys: Sequence[int | Draw]) -> dict[str, Any]:
        """A batch: ``x`` (N, 1, S, S), ``y``, N captions, and ``names``."""
        draws = [Draw.of(key) for key in keys]
        num_phrasings = self.choices.shape[1]
        phrasings = [draw_choice(self.seed, draw, num_phrasings) for draw in draws]
        samples = [draw.sample for draw in draws]
        rows = self.choices.numpy()[samples, phrasings]
        # NumPy copies on this thread; torch would wake its thread pool, which stalls where cores are oversubscribed
        y = Captions(
            torch.from_numpy(self.captions.embeddings.numpy()[rows]), torch.from_numpy(self.captions.mask.numpy()[rows])
        )
        return {"x": torch.from_numpy(self.x.numpy()[samples]), "y": y, "names": digit_names(samples)}


class CaptionedDigitsDataModule(DigitsDataModule):
    """Real handwritten digits in pixel space with true captions, in three phrasings of which an epoch draws one.

    Batches are ``{"x": (N, 1, S, S), "y": Captions, "names": N strings}``. Validation always sees the same captions.

    Args:
        size: side of the images in pixels; 8 is native, more is upsampled bilinearly.
        batch_size: images a step and process.
        val_fraction: share of every class that is held out.
        seed: of the split, the order and the phrasings.
        num_workers: reading processes; the data lie in memory, so 0 is enough.
        text_encoder: "words", which needs no weights, or a folder or hub id of a T5.
        caption_length: L, tokens that captions are padded to; no caption of these digits has more than 11 words,
            commas and the end included.
    """

    def __init__(
        self,
        size: int = NATIVE_SIZE,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        text_encoder: str = "words",
        caption_length: int = 16,
    ) -> None:
        super().__init__(size, batch_size, val_fraction, seed, num_workers)
        self.text_encoder = make_text_encoder(text_encoder, max_length=caption_length)

    @property
    def caption_shape(self) -> tuple[int, int]:
        """(L, E) of the captions."""
        return self.text_encoder.max_length, self.text_encoder.width

    @property
    def null_captions(self) -> Captions:
        """The empty caption, N = 1."""
        return in_float32(self.text_encoder.encode([""]))

    @property
    def resume_settings(self) -> dict[str, Any]:
        return {**super().resume_settings, "text_encoder": self.text_encoder.fingerprint}

    def make_dataset(self) -> Dataset[Any]:
        """All digits with their captions, each distinct one embedded once.

        Raises:
            ValueError: if a caption does not fit into the caption length.
        """
        captions = real_captions()
        texts = sorted({text for phrasings in captions for text in phrasings})
        self._check_length(texts)
        place = {text: row for row, text in enumerate(texts)}
        choices = torch.tensor([[place[text] for text in phrasings] for phrasings in captions])
        return CaptionedDigits(self.images, in_float32(self.text_encoder.encode(texts)), choices, self.seed)

    def captions_of(self, split: Literal["train", "val"]) -> list[tuple[str, ...]]:
        """The three captions of each image, in the order of :meth:`train_images` or :meth:`val_images`."""
        self.setup()
        indices = {"train": self.train_indices, "val": self.val_indices}[split]
        captions = real_captions()
        return [captions[index] for index in indices.tolist()]

    def _check_length(self, texts: Sequence[str]) -> None:
        num_cut = sum(self.text_encoder.truncated(texts))
        if num_cut:
            raise ValueError(
                f"{num_cut} of {len(texts)} captions have more than caption_length {self.text_encoder.max_length} "
                f"tokens and would not be true without their ends: raise caption_length"
            )


def in_float32(captions: Captions) -> Captions:
    """As NumPy can index them, which has no bfloat16."""
    return replace(captions, embeddings=captions.embeddings.float())
