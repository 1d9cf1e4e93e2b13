"""The configs that decide a model's parameters, their shapes and the function they compute: data only, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
