"""The model families."""

from __future__ import annotations

from flexidit.config import DiTConfig, TextDiTConfig, TransformerConfig, WanConfig
from flexidit.models.dit import DiT
from flexidit.models.text_dit import TextDiT
from flexidit.models.transformer import FlexiTransformer
from flexidit.models.wan import Wan


def plain_model(config: TransformerConfig) -> FlexiTransformer:
    """A model with one patch size and fresh weights, of the config's family; a ``flex`` in it is not looked at."""
    if isinstance(config, WanConfig):
        return Wan(config)
    if isinstance(config, TextDiTConfig):
        return TextDiT(config)
    assert isinstance(config, DiTConfig)
    return DiT(config)
