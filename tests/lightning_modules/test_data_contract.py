"""What a datamodule says of its latents, and who is told when it does not fit."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from lightning_modules.data_contract import codec_fingerprint_of, warn_of_other_codec

VAE = {"class": "AutoencoderKL", "scaling_factor": 0.18215, "weights_sha256": "a"}


def test_pixels_have_no_codec_and_latents_theirs() -> None:
    assert codec_fingerprint_of(None) is None
    assert codec_fingerprint_of(SimpleNamespace(fingerprint={"codec": {"class": "PixelCodec"}})) is None
    assert codec_fingerprint_of(SimpleNamespace(fingerprint={"codec": VAE})) == VAE


def test_another_vae_is_told_by_the_field_that_differs() -> None:
    with pytest.warns(UserWarning, match="differ in scaling_factor"):
        warn_of_other_codec(VAE, {**VAE, "scaling_factor": 0.13025})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_codec(VAE, VAE)
        warn_of_other_codec(None, VAE)
