"""Captioned images: raw files, webdataset tars, or latents and caption embeddings made by ``flexidit encode``.

Shape legend: N batch, C channels and H W size of what the model sees (latents, or pixels), L caption tokens.
"""

from datamodules.captioned_data import CaptionedDataModule
from flexidit.captioned_images import CaptionedIndex, find_captioned_images
from flexidit.latent_shards import OnError
from flexidit.latents import CodecDtype
from flexidit.sample_readers import ImageReader


class TextImageDataModule(CaptionedDataModule):
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
        on_error: count and leave out what is broken (images, captions, shards), or refuse the first; also
            what breaks or vanishes during the run, whose place others take.
        seed: of order, choice of captions, flips, noise and split.
    """

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
            reader=ImageReader(image_size),
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

    def find(self, root: str, captions: str | None) -> CaptionedIndex:
        """The captioned images of a folder."""
        return find_captioned_images(root, captions)
