"""What training modules ask of a datamodule beside its batches. Every attribute is optional.

``sample_shape`` (C, H, W); ``num_classes`` of labels; ``caption_shape`` (L, E) and ``null_captions`` of captions;
``fingerprint["text_encoder"]``, or a ``text_encoder`` with a ``fingerprint``.

Shape legend: N samples, C H W channels, height and width of what the model sees, L caption tokens, E width of the text
encoder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from flexidit.conditions import Captions
from flexidit.config import CaptionedConfig, DiTConfig, TransformerConfig
from flexidit.fingerprints import fingerprint_differences


def check_data(config: TransformerConfig, datamodule: Any) -> None:
    """Refuse data that do not fit the model before the first step does it in a worse way.

    Raises:
        ValueError: samples of another shape, more classes, captions that the model cannot take, labels for a model of
            captions or captions for a model of labels.
    """
    shape, expected = getattr(datamodule, "sample_shape", None), (config.in_channels, *config.input_size)
    if shape is not None and tuple(shape) != expected:
        raise ValueError(
            f"the data have samples of shape {tuple(shape)}, the model takes {expected}: set in_channels and "
            "input_size in target.overrides, or use other data"
        )
    if isinstance(config, CaptionedConfig):
        _check_captions(config, datamodule)
    elif isinstance(config, DiTConfig):
        _check_labels(config, datamodule)


def null_captions_of(datamodule: Any, config: TransformerConfig) -> Captions | None:
    """The data's empty caption, N = 1, for a model without a null caption of its own; None where none is needed.

    Raises:
        ValueError: it is needed, since captions are dropped, and the data have none.
    """
    if not isinstance(config, CaptionedConfig) or config.has_null_caption or config.class_dropout_prob == 0:
        return None
    captions = getattr(datamodule, "null_captions", None)
    if captions is None:
        raise ValueError(
            f"captions are to be dropped with probability {config.class_dropout_prob:g}, but these weights have no "
            "null caption and the data have no null_captions: use a datamodule with them, or set "
            "target.overrides.class_dropout_prob to 0"
        )
    return captions


def text_fingerprint_of(datamodule: Any, config: TransformerConfig) -> dict[str, Any] | None:
    """What identifies the text encoder behind the captions, in plain values; None for labels, or if it is not said."""
    if not isinstance(config, CaptionedConfig):
        return None
    encoder = getattr(datamodule, "text_encoder", None)
    if encoder is not None:
        return encoder.fingerprint
    return (getattr(datamodule, "fingerprint", None) or {}).get("text_encoder")


def codec_fingerprint_of(datamodule: Any) -> dict[str, Any] | None:
    """What identifies the VAE behind the latents, in plain values; None for pixels, or where it is not said."""
    codec = (getattr(datamodule, "fingerprint", None) or {}).get("codec")
    return None if codec is None or codec.get("class") == "PixelCodec" else codec


def warn_of_other_codec(data: dict[str, Any] | None, own: dict[str, Any]) -> None:
    """Say that pictures and metrics are decoded by another VAE than the one that made the latents."""
    differing = fingerprint_differences(data, own) if data is not None else {}
    if differing:
        rank_zero_warn(
            f"the latents were made by another VAE than model.vae (they differ in {', '.join(differing)}): pictures "
            "and metrics will be wrong; give the VAE that the data were encoded with"
        )


def as_many(null: Captions, y: Captions) -> Captions:
    """One caption as often as there are others, with their type and their images' sizes."""
    many = null[torch.zeros(len(y), dtype=torch.int64, device=null.device)]
    return replace(many, embeddings=many.embeddings.to(y.embeddings.dtype), image_size=y.image_size)


def _check_captions(config: CaptionedConfig, datamodule: Any) -> None:
    shape = getattr(datamodule, "caption_shape", None)
    if shape is None:
        if getattr(datamodule, "num_classes", None) is not None:
            raise ValueError("the data have labels, the model takes captions: use captioned data or a DiT variant")
        return
    length, width = shape
    if width != config.caption_channels:
        raise ValueError(
            f"the captions are {width} wide, the model takes {config.caption_channels}: set caption_channels in "
            "target.overrides, or use the text encoder that the model was trained with"
        )
    if length > config.caption_length:
        raise ValueError(
            f"the captions have {length} tokens, the model takes {config.caption_length} at most: set caption_length "
            "in target.overrides, or encode shorter captions"
        )


def _check_labels(config: DiTConfig, datamodule: Any) -> None:
    if getattr(datamodule, "caption_shape", None) is not None:
        raise ValueError("the data have captions, the model takes labels: use a TextDiT or PixArt variant")
    num_classes = getattr(datamodule, "num_classes", None)
    if num_classes is not None and num_classes > config.num_classes:
        raise ValueError(
            f"the data have {num_classes} classes, the model {config.num_classes}: set num_classes in "
            "target.overrides, or use other data"
        )
