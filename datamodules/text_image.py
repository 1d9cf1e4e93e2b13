"""Captioned images: raw files, webdataset tars, or latents and caption embeddings made by ``flexidit encode``.

Shape legend: N batch, C channels and H W size of what the model sees (latents, or pixels), L caption tokens, E width of
the text encoder.
"""

import logging
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from datamodules.captioned_samples import CaptionedSamples
from datamodules.image_data import ImageDataModule
from flexidit.caption_shards import CaptionedLatents
from flexidit.captioned_images import find_captioned_images
from flexidit.conditions import Captions
from flexidit.latent_shards import OnError
from flexidit.latents import CodecDtype
from flexidit.skips import SkipReport
from flexidit.text import TextEncoder, WordEncoder, make_text_encoder

logger = logging.getLogger(__name__)
_MAX_LOGGED = 10  # of the captions that are too long; the rest is only counted


class TextImageDataModule(ImageDataModule):
    """Captioned images for training and validation.

    Batches are ``{"x": (N, C, H, W) float32, "y": Captions}``. What lies at ``train`` decides how it is read:

    - latents with caption embeddings, from ``flexidit encode --captions``: what trains fastest, since neither the VAE
      nor the text encoder runs again;
    - a folder of images with COCO annotations, ``metadata.jsonl``, or a text beside each image
      (:func:`~flexidit.captioned_images.find_captioned_images`): encoded on the fly, images by ``vae`` if it is given
      and pixels otherwise, captions by ``text_encoder``. The same seed gives the batches that the stored ones would
      have given;
    - webdataset tars (``name.jpg`` with ``name.txt``, one caption a line, or ``name.json`` with ``captions``,
      ``caption`` or ``text``): likewise. A resume reads the begun epoch again to its place.

    Of several captions each epoch draws one, keyed by (seed, epoch, image); validation always sees the same.

    Images become squares by one rule, that of PixArt's 256 and of DiT: the short side is resized to ``image_size``, the
    centre is cut out (:func:`~flexidit.images.center_crop`). PixArt resizes in one bicubic step; this crop halves
    large images with a box filter before, which has the same geometry and less aliasing. ``Captions.image_size``
    stays None: all images have the size that the model works at.

    Args:
        train: folder or tar pattern of the training data.
        val: the same for validation; None holds out ``val_fraction`` of the training data, which tars cannot.
        captions: where the captions of a folder ``train`` are, if not at a place where they are found by themselves.
        val_captions: the same for ``val``.
        image_size: side of the centre crop in pixels; latents must have been made with it.
        batch_size: images a step and process.
        num_workers: reading processes.
        vae: folder or hub id of the VAE. For latents it is only compared with the one that made them; None trusts
            them. For images and tars None means that the model works on pixels.
        codec_dtype: precision of encoding images on the fly.
        text_encoder: folder or hub id of a T5, or "words" for demonstrations. For latents it is only compared with the
            one that made them; None trusts them. Images and tars need it, on every device that trains: T5-XXL takes
            10 GB of each, and half of the time or more.
        tokenizer: folder or hub id of the tokenizer, where it is not beside the text encoder.
        caption_length: L; longer captions are cut and counted, stored ones refused. None means as latents were made,
            else 120, and 16 for "words".
        flip: mirror half of the training images; captions that say left or right are then wrong.
        val_fraction: share of ``train`` to hold out if ``val`` is None.
        num_train_samples: images in the training tars; None counts them, which reads all their headers.
        shuffle_buffer: samples held for shuffling a stream of tars.
        on_error: count and leave out what is broken (images, captions, shards), or refuse the first.
        seed: of order, choice of captions, flips, noise and split.
    """

    tar_target = "caption"

    def __init__(
        self,
        train: str,
        val: str | None = None,
        captions: str | None = None,
        val_captions: str | None = None,
        image_size: int = 256,
        batch_size: int = 32,
        num_workers: int = 4,
        vae: str | None = None,
        codec_dtype: CodecDtype = "float32",
        text_encoder: str | None = None,
        tokenizer: str | None = None,
        caption_length: int | None = None,
        flip: bool = False,
        val_fraction: float = 0.0,
        num_train_samples: int | None = None,
        shuffle_buffer: int = 1000,
        on_error: OnError = "skip",
        seed: int = 0,
    ) -> None:
        super().__init__(
            train,
            val,
            image_size=image_size,
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

    def open_images(self, root: str, flip: bool) -> CaptionedSamples:
        """Images with captions as text."""
        images = find_captioned_images(root, self.captions if root == self.train else self.val_captions)
        return CaptionedSamples(images, self.image_size, seed=self.seed, flip=flip, on_error=self.on_error)

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
        """Encode raw images and captions on the device that they have been moved to; leaves ``x`` and ``y``."""
        if "texts" not in batch:
            return batch
        return {"x": self.encode_images(batch), "y": self._encode_captions(batch["texts"], batch["x"].device)}

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
