"""Captioned clips: raw files, webdataset tars, or latents and caption embeddings made by ``flexidit encode``.

Shape legend: N batch, C channels, F frames and H W size of what the model sees (latents, or pixels), L caption tokens.
"""

from dataclasses import replace
from typing import Any

from datamodules.captioned_data import CaptionedDataModule
from flexidit.captioned_images import CaptionedIndex, find_captioned_clips
from flexidit.clips import ClipSettings
from flexidit.latent_shards import OnError
from flexidit.latents import CodecDtype
from flexidit.sample_readers import ClipReader


class TextVideoDataModule(CaptionedDataModule):
    """Captioned clips for training and validation.

    Batches are ``{"x": (N, C, F, H, W) float32, "y": Captions}``. What lies at ``train`` decides how it is read:

    - latents with caption embeddings, from ``flexidit encode CLIPS --captions``: what trains fastest by far, since
      nothing is decoded and neither the VAE nor the text encoder runs again;
    - a folder of clips with ``metadata.jsonl``, or a text beside each clip
      (:func:`~flexidit.captioned_images.find_captioned_clips`): decoded and encoded on the fly, clips by ``vae`` if it
      is given and pixels otherwise, captions by ``text_encoder``;
    - webdataset tars (``name.mp4`` with ``name.txt``, one caption a line, or ``name.json`` with ``captions``,
      ``caption`` or ``text``): likewise. A resume reads the begun epoch again to its place.

    Of several captions each epoch draws one, and of a clip that is longer than needed each epoch draws a window
    (``draw_windows``), both keyed by (seed, epoch, clip). Validation always sees the same captions, and the middle
    window. Stored latents are of the middle window, too: with ``draw_windows=False`` raw clips and stored latents of
    the same seed give the same batches.

    Frames are taken at ``fps`` whatever the rate of the file, and cropped by one rule
    (:func:`~flexidit.clips.read_clip`): the largest central part of the shape of ``size``, resampled to it. A clip
    that cannot be decoded or is too short is replaced by the next good one, counted and named.

    Args:
        train: folder or tar pattern of the training data.
        val: the same for validation; None holds out ``val_fraction`` of the training data, which tars cannot.
        captions: where the captions of a folder ``train`` are, if not at a place where they are found by themselves.
        val_captions: the same for ``val``.
        num_frames: F in pixels; 1 more than a multiple of 4 for Wan's VAE and of 8 for CogVideoX's. Latents must have
            been made with it.
        fps: frames per second that clips are read at; null takes all frames as they are stored. Latents must have
            been made with it.
        size: height and width of the crop in pixels; latents must have been made with it.
        batch_size: clips a step and process.
        num_workers: reading processes.
        vae: folder or hub id of the VAE. For latents it is only compared with the one that made them; None trusts
            them. For clips and tars None means that the model works on pixels. A VAE of images takes frames one by one.
        codec_dtype: precision of encoding clips on the fly.
        text_encoder: folder or hub id of a T5, or "words" for demonstrations. For latents it is only compared with the
            one that made them; None trusts them. Clips and tars need it, on every device that trains.
        tokenizer: folder or hub id of the tokenizer, where it is not beside the text encoder.
        caption_length: L; longer captions are cut and counted, stored ones refused. None means as latents were made,
            else 120, and 16 for "words".
        flip: mirror half of the training clips; captions that say left or right are then wrong.
        draw_windows: draw the window of longer clips anew in each epoch of training; False takes the middle.
        val_fraction: share of ``train`` to hold out if ``val`` is None.
        num_train_samples: clips in the training tars; None counts them, which reads all their headers.
        shuffle_buffer: clips held, as files, for shuffling a stream of tars.
        on_error: count and leave out what is broken (clips, captions, shards), or refuse the first; also
            what breaks or vanishes during the run, whose place others take.
        seed: of order, choice of captions, windows, flips, noise and split.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        captions: str | None = None,
        val_captions: str | None = None,
        num_frames: int = 81,
        fps: float | None = 16.0,
        size: tuple[int, int] = (480, 832),
        batch_size: int = 1,
        num_workers: int = 4,
        vae: str | None = None,
        codec_dtype: CodecDtype = "float32",
        text_encoder: str | None = None,
        tokenizer: str | None = None,
        caption_length: int | None = None,
        flip: bool = False,
        draw_windows: bool = True,
        val_fraction: float = 0.0,
        num_train_samples: int | None = None,
        shuffle_buffer: int = 100,
        on_error: OnError = "skip",
        seed: int = 0,
    ) -> None:
        height, width = size
        reader = ClipReader(ClipSettings(num_frames, (height, width), fps))
        super().__init__(
            train,
            val,
            reader=reader,
            captions=captions,
            val_captions=val_captions,
            batch_size=batch_size,
            num_workers=num_workers,
            vae=vae,
            codec_dtype=codec_dtype,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            caption_length=caption_length,
            flip=flip,
            val_fraction=val_fraction,
            num_train_samples=num_train_samples,
            shuffle_buffer=shuffle_buffer,
            on_error=on_error,
            seed=seed,
        )
        self._readers = {True: replace(reader, draws_window=draw_windows), False: reader}

    @property
    def resume_settings(self) -> dict[str, Any]:
        return {**super().resume_settings, "draw_windows": self._readers[True].draws_window}

    def find(self, root: str, captions: str | None) -> CaptionedIndex:
        """The captioned clips of a folder."""
        return find_captioned_clips(root, captions)

    def reader_for(self, training: bool) -> ClipReader:
        """Windows are drawn for training and stay for validation."""
        return self._readers[training]
