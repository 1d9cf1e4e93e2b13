"""Names of models, as papers and users write them, and the configs behind them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flexidit.config import AnyConfig, DiTConfig, TextDiTConfig, WanConfig
from flexidit.patch_size import PatchSize

if TYPE_CHECKING:
    from flexidit.models import DiT, TextDiT, Wan

_DIT_WIDTHS = {  # hidden_size, depth, num_heads (Peebles and Xie 2023, table 1)
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "Tiny": (64, 2, 4),  # for tests and demonstrations
}
_DIT_PATCHES = (2, 4, 8)


def _variants() -> Mapping[str, AnyConfig]:
    table: dict[str, AnyConfig] = {
        f"DiT-{name}/{patch}": DiTConfig(
            patch_size=PatchSize.parse(patch), hidden_size=width, depth=depth, num_heads=heads
        )
        for name, (width, depth, heads) in _DIT_WIDTHS.items()
        for patch in _DIT_PATCHES
    }
    table["PixArt-XL/2-256"] = TextDiTConfig()
    table["PixArt-XL/2-512"] = TextDiTConfig(input_size=(64, 64))
    table["PixArt-XL/2-1024"] = TextDiTConfig(input_size=(128, 128), position_scale=2.0, micro_conditions=True)
    # 24 layers, width 2048, 4096 tokens, about 1.7 B parameters (appendix B.5, C.1); the autoencoder's 16 channels are
    # Emu's (Dai et al. 2023); 256 text tokens fit the paper's FLOPs (READING.md); head size and text width are not said
    table["Emu-1.7B"] = TextDiTConfig(
        input_size=(128, 128),
        in_channels=16,
        hidden_size=2048,
        depth=24,
        num_heads=16,
        learn_sigma=False,
        caption_length=256,
        position_table="learned",
        qk_norm=True,
    )
    # The paper's Video DiT is 4.9 B parameters "as the one in" Movie Gen (sections 4.3, C.2): 32 layers of width 3072,
    # SwiGLU, factorised learned positions; 256 frames of 384x704 pixels, downsampled by 8 along each axis
    table["VideoDiT-4.9B"] = TextDiTConfig(
        input_size=(32, 48, 88),
        in_channels=16,
        hidden_size=3072,
        depth=32,
        num_heads=24,
        mlp="swiglu",
        mlp_ratio=8 / 3,
        learn_sigma=False,
        caption_length=256,
        position_table="learned",
        qk_norm=True,
    )
    table["VideoDiT-Tiny"] = TextDiTConfig(
        input_size=(8, 16, 16),
        in_channels=1,
        hidden_size=64,
        depth=2,
        num_heads=4,
        mlp="swiglu",
        mlp_ratio=8 / 3,
        learn_sigma=False,
        caption_channels=64,
        caption_length=16,
        qk_norm=True,
    )
    table["TextDiT-S/2"] = TextDiTConfig(hidden_size=384, depth=12, num_heads=6)
    table["TextDiT-Tiny/2"] = TextDiTConfig(
        hidden_size=64, depth=2, num_heads=4, caption_channels=64, caption_length=16
    )
    table["Wan-1.3B"] = WanConfig()  # 81 frames of 480x832 pixels, downsampled by 4 and 8 (Wan Team 2025)
    table["Wan-14B"] = WanConfig(hidden_size=5120, depth=40, num_heads=40, mlp_ratio=13824 / 5120)
    table["Wan-Tiny"] = WanConfig(
        input_size=(8, 16, 16),
        in_channels=1,
        hidden_size=64,
        depth=2,
        num_heads=4,
        mlp_ratio=4.0,
        caption_channels=64,
        caption_length=16,
    )
    return MappingProxyType(table)


VARIANTS = _variants()


def known_variants() -> tuple[str, ...]:
    """All names that :func:`create_model` accepts."""
    return tuple(VARIANTS)


def variant_config(name: str, **overrides: Any) -> AnyConfig:
    """The config of a named variant, with any of its fields replaced.

    Args:
        name: such as ``"DiT-XL/2"`` or ``"PixArt-XL/2-256"``.
        **overrides: fields of the variant's config; ``input_size`` may be an int for a square latent, and is (F, H, W)
            for clips.

    Raises:
        ValueError: an unknown name or field; the message lists the known ones.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}{_suggest(name, known_variants())}")
    config = VARIANTS[name]
    known = [field.name for field in fields(config) if field.name != "flex"]
    for field in overrides:
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}{_suggest(field, known)}")
    return replace(config, **{field: _parsed(field, value) for field, value in overrides.items()})


def create_model(name: str, **overrides: Any) -> DiT | TextDiT | Wan:
    """A randomly initialised model of a named variant.

    Args:
        name: such as ``"DiT-XL/2"`` or ``"PixArt-XL/2-256"``.
        **overrides: fields of the variant's config; ``input_size`` may be an int for a square latent, and is (F, H, W)
            for clips.

    Raises:
        ValueError: an unknown name or field; the message lists the known ones.

    Example:
        >>> model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
        >>> model.base_patch_size.name
        '1x2x2'
    """
    from flexidit.models import plain_model

    return plain_model(variant_config(name, **overrides))  # type: ignore[return-value]


def _parsed(field: str, value: Any) -> Any:
    if field == "patch_size":
        return PatchSize.parse(value)
    if field == "input_size":
        sides = (value, value) if isinstance(value, int) else tuple(value)
        if len(sides) not in (2, 3) or any(not isinstance(side, int) or side < 1 for side in sides):
            raise ValueError(f"input_size is a positive int, (H, W), or (F, H, W) for clips, got {value!r}")
        return sides
    return value


def _suggest(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known are {', '.join(known)}"
