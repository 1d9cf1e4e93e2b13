"""Names of models, as papers and users write them, and the configs behind them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from flexidit.config import DiTConfig
from flexidit.patch_size import PatchSize

if TYPE_CHECKING:
    from flexidit.models.dit import DiT

_DIT_WIDTHS = {  # hidden_size, depth, num_heads (Peebles and Xie 2023, table 1)
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "Tiny": (64, 2, 4),  # for tests and demonstrations
}
_DIT_PATCHES = (2, 4, 8)


def known_variants() -> tuple[str, ...]:
    """All names that :func:`create_model` accepts."""
    return tuple(f"DiT-{width}/{patch}" for width in _DIT_WIDTHS for patch in _DIT_PATCHES)


def variant_config(name: str, **overrides: Any) -> DiTConfig:
    """The config of a named variant, with any of its fields replaced.

    Args:
        name: such as ``"DiT-XL/2"``.
        **overrides: fields of the variant's config; ``input_size`` may be an int for a square latent.

    Raises:
        ValueError: an unknown name or field; the message lists the known ones.
    """
    if name not in known_variants():
        raise ValueError(f"unknown model {name!r}{_suggest(name, known_variants())}")
    width, patch = name.removeprefix("DiT-").split("/")
    hidden_size, depth, num_heads = _DIT_WIDTHS[width]
    config = DiTConfig(patch_size=PatchSize.parse(patch), hidden_size=hidden_size, depth=depth, num_heads=num_heads)
    known = [field.name for field in fields(config) if field.name != "flex"]
    for field in overrides:
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}{_suggest(field, known)}")
    return replace(config, **{field: _parsed(field, value) for field, value in overrides.items()})


def create_model(name: str, **overrides: Any) -> DiT:
    """A randomly initialised model of a named variant.

    Args:
        name: such as ``"DiT-XL/2"``.
        **overrides: fields of the variant's config; ``input_size`` may be an int for a square latent.

    Raises:
        ValueError: an unknown name or field; the message lists the known ones.

    Example:
        >>> model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
        >>> model.base_patch_size.name
        '1x2x2'
    """
    from flexidit.models.dit import DiT

    return DiT(variant_config(name, **overrides))


def _parsed(field: str, value: Any) -> Any:
    if field == "patch_size":
        return PatchSize.parse(value)
    if field == "input_size":
        sides = (value, value) if isinstance(value, int) else tuple(value)
        if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
            raise ValueError(f"input_size is a positive int or (H, W), got {value!r}")
        return sides
    return value


def _suggest(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known are {', '.join(known)}"
