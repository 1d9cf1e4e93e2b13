"""The configs that decide a model's parameters, their shapes and the function they compute: data only, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from flexidit.patch_size import PatchSize

Positions = Literal["coords", "grid"]
Recipe = Literal["shared", "lora"]


@dataclass(frozen=True)
class FlexConfig:
    """What ``flexify`` added to a pre-trained model."""

    recipe: Recipe
    """"shared": one set of weights for all sizes (section 3.1); "lora": frozen base, an adapter per size (3.2)."""
    weak_patch_sizes: tuple[PatchSize, ...]
    """The added sizes, most powerful first."""
    underlying_patch_size: PatchSize | None = None
    """Size p' at which the shared (de)embedding weights are held; None in the lora recipe."""
    size_norms: bool = True
    """Whether weak sizes scale and shift the layer norms (shared recipe)."""
    positions: Positions = "coords"
    """Where a weak patch sits: at the coordinates of its centre, or at its index."""
    rank: int | None = None
    """Rank of the adapters; None in the shared recipe."""
    alpha: float | None = None
    """The adapters' update is scaled by alpha / rank."""


@dataclass(frozen=True)
class DiTConfig:
    """A class-conditional diffusion transformer (Peebles and Xie 2023)."""

    input_size: tuple[int, int] = (32, 32)
    """Latent height and width."""
    patch_size: PatchSize = PatchSize(1, 2, 2)
    """The pre-trained, most powerful size."""
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True
    frequency_shift: int = 0
    """0 in the official code, 1 in diffusers' port; see ``layers.TimestepEmbedder``."""
    mlp_norm_eps: float = 1e-6
    """1e-6 in the official code; diffusers' port reads it from its ``norm_eps``."""
    flex: FlexConfig | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not work with {self.num_heads} heads: "
                "it must be a multiple of num_heads and of 4"
            )


def config_to_dict(config: DiTConfig) -> dict[str, Any]:
    """Plain values only, for json and for checkpoints that are read without unpickling code."""
    return {"family": "DiT", **_plain(asdict(config))}


def config_from_dict(values: Mapping[str, Any]) -> DiTConfig:
    """Inverse of :func:`config_to_dict`.

    Raises:
        ValueError: an unknown family or field, as of a checkpoint that a newer version wrote.
    """
    values = dict(values)
    family = values.pop("family", None)
    if family != "DiT":
        raise ValueError(f"the model family {family!r} is not known here; known is 'DiT'")
    _check_fields(DiTConfig, values)
    flex = values.pop("flex", None)
    values["patch_size"] = PatchSize.parse(values["patch_size"])
    values["input_size"] = tuple(values["input_size"])
    return DiTConfig(**values, flex=None if flex is None else _flex_from_dict(flex))


def _flex_from_dict(values: Mapping[str, Any]) -> FlexConfig:
    values = dict(values)
    _check_fields(FlexConfig, values)
    underlying = values["underlying_patch_size"]
    values["underlying_patch_size"] = None if underlying is None else PatchSize.parse(underlying)
    values["weak_patch_sizes"] = tuple(PatchSize.parse(size) for size in values["weak_patch_sizes"])
    return FlexConfig(**values)


def _check_fields(kind: type[DiTConfig] | type[FlexConfig], values: Mapping[str, Any]) -> None:
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; was this written by a newer version?")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"t", "h", "w"}:
            return PatchSize(**value).name
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
