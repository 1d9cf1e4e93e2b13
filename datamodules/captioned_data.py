"""What data modules over captioned images and over captioned clips share: captions of all three kinds of sources.

Shape legend: N batch, C channels, F frames of clips and H W size of what the model sees (latents, or pixels), L caption
tokens, E width of the text encoder.
"""

import logging
import textwrap
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from datamodules.captioned_samples import CaptionedSamples
from datamodules.file_data import FileDataModule
from flexidit.caption_shards import CaptionedLatents
from flexidit.captioned_images import CaptionedIndex
from flexidit.conditions import Captions
from flexidit.latent_shards import OnError
from flexidit.latents import CodecDtype
from flexidit.sample_readers import SampleReader
from flexidit.skips import SkipReport
from flexidit.text import TextEncoder, WordEncoder, make_text_encoder

logger = logging.getLogger(__name__)
_MAX_LOGGED = 10  # of the captions that are too long; the rest is only counted


class CaptionedDataModule(FileDataModule):
    """Images or clips with captions, as batches with their names.

    Batches are ``{"x": (N, C, H, W) or (N, C, F, H, W) float32, "y": Captions, "names": N strings}``.

    Subclasses say what is read of a file, find captioned files, and explain the arguments.
    """

    tar_target = "caption"

    def __init__(
        self,
        train: str,
        val: str | None,
        *,
        reader: SampleReader,
        captions: str | None,
        val_captions: str | None,
        batch_size: int,
        num_workers: int,
        vae: str | None,
        codec_dtype: CodecDtype,
        text_encoder: str | None,
        tokenizer: str | None,
        caption_length: int | None,
        flip: bool,
        val_fraction: float,
        num_train_samples: int | None,
        shuffle_buffer: int,
        on_error: OnError,
        seed: int,
    ) -> None:
        super().__init__(
            train,
            val,
            reader=reader,
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
        self.captions, self.val_captions, self.caption_length = captions, val_captions, caption_length
        self.text_encoder: TextEncoder | WordEncoder | None = None
        if text_encoder is not None:
            self.text_encoder = make_text_encoder(text_encoder, tokenizer=tokenizer, max_length=caption_length)
        self._cut: dict[int, str] = {}  # captions that were too long: hash and beginning

    @abstractmethod
    def find(self, root: str, captions: str | None) -> CaptionedIndex:
        """The captioned files of a folder."""

    @property
    def null_captions(self) -> Captions:
        """The empty caption, N = 1, on the CPU."""
        split = self.split("train")
        if split.kind == "latents":
            return split.dataset.null_captions
        return self._encoder().encode([""])

    @property
    def caption_shape(self) -> tuple[int, int]:
        """(L, E) of the captions."""
        split = self.split("train")
        if split.kind == "latents":
            return split.dataset.caption_shape
        return self._encoder().max_length, self._encoder().width

    @property
    def fingerprint(self) -> dict[str, Any]:
        """How the batches were made: codec, crop, size and text encoder."""
        fingerprint = super().fingerprint
        if self.split("train").kind == "latents":
            return fingerprint
        return fingerprint | {"text_encoder": self._encoder().fingerprint}

    @property
    def resume_settings(self) -> dict[str, Any]:
        return {**super().resume_settings, "caption_length": self.caption_shape[0]}

    def expected(self) -> dict[str, Any]:
        """Fields of the fingerprint that stored latents must agree with."""
        if self.text_encoder is None:
            return super().expected()
        # the length is no part of it: where all captions fit, they may be padded to another one
        text = {name: value for name, value in self.text_encoder.fingerprint.items() if name != "max_length"}
        return super().expected() | {"text_encoder": text}

    def open_latents(self, root: str, expected: dict[str, Any], flip: bool) -> CaptionedLatents:
        """Latents with caption embeddings; a text encoder was there to be compared only."""
        if isinstance(self.text_encoder, TextEncoder):
            self.text_encoder.release()
        return CaptionedLatents(
            root,
            expected=expected,
            seed=self.seed,
            flip=flip,
            on_error=self.on_error,
            caption_length=self.caption_length,
        )

    def open_files(self, root: str, flip: bool, training: bool) -> CaptionedSamples:
        """Images or clips with captions as text."""
        source = self.find(root, self.captions if root == self.train else self.val_captions)
        reader = self.reader_for(training)
        return CaptionedSamples(source, reader, seed=self.seed, flip=flip, on_error=self.on_error)

    def check_raw(self) -> None:
        """Also refuse captions as text without a text encoder."""
        super().check_raw()
        self._encoder()

    def skipped(self) -> dict[str, SkipReport]:
        """What was left out so far, by split; and under ``captions``, the captions that lost their ends."""
        cut = SkipReport()
        for name in self._cut.values():
            cut.add(name, f"cut to {self._encoder().max_length} tokens")
        return super().skipped() | ({"captions": cut} if self._cut else {})

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Encode samples and captions on the device that they have been moved to; leaves ``x``, ``y`` and ``names``."""
        if "texts" not in batch:
            return batch
        return self.encoded(batch, self._encode_captions(batch["texts"], batch["x"].device))

    def _encode_captions(self, texts: Sequence[str], device: torch.device) -> Captions:
        encoder = self._encoder().to(device)
        for text, is_cut in zip(texts, encoder.truncated(texts), strict=True):
            if is_cut and hash(text) not in self._cut:
                self._cut[hash(text)] = textwrap.shorten(text, 60, placeholder=" ...")
                if len(self._cut) <= _MAX_LOGGED:
                    logger.warning("cut to %d tokens: %s", encoder.max_length, self._cut[hash(text)])
        return encoder.encode(texts).to(device)

    def _encoder(self) -> TextEncoder | WordEncoder:
        if self.text_encoder is None:
            raise ValueError(
                f"captions as text, as in {self.train}, need text_encoder: give the folder or hub id of a T5, or train "
                f"on latents of `flexidit encode --captions`"
            )
        return self.text_encoder
