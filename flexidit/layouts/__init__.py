"""The public layouts of each family's weights, and which one a model or a file has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from flexidit.config import TransformerConfig, family_of
from flexidit.layouts import dit, pixart, wan


class Layout(Protocol):
    """What the module of a family offers."""

    CLASS_NAME: str
    """Of the family in diffusers."""
    OFFICIAL_CLASS: str | None
    """What the ``config.json`` of a directory of official weights says; None: there are no such directories."""
    BLOCKS: str
    """diffusers' name of the list of blocks."""
    EMBEDDING: str
    """diffusers' name of the layer that turns patches into tokens."""
    FINAL_LINEAR: str
    """diffusers' name of the layer that turns tokens into patches."""
    ADAPTED: Mapping[str, tuple[str, ...]]
    """Layers of a block that carry adapters, ours -> diffusers'; several are ours cut into equal parts."""
    BESIDE: Mapping[str, str]
    """File beside diffusers' weights -> the one tensor in it, which diffusers' layout has no place for."""
    UNTOLD_BY_SHAPES: tuple[str, ...]
    """Fields of the config that official weights may leave open."""
    UNTOLD_BY_DIFFUSERS: tuple[str, ...]
    """Fields of the config that no file of diffusers' layout tells."""

    def is_official(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the names of a state dict are the family's official ones."""

    def told_by_official(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that the ``config.json`` of a directory of official weights tells."""

    def config_from_official(self, state: Mapping[str, Tensor], **overrides: Any) -> Any:
        """Read a config off the shapes of an official state dict."""

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An official state dict by our names."""

    def to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of ``from_official``."""

    def config_from_diffusers(self, values: Mapping[str, Any]) -> Any:
        """From a ``config.json`` of diffusers."""

    def config_to_diffusers(self, config: Any) -> dict[str, Any]:
        """Arguments of diffusers' class."""

    def to_diffusers(self, state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
        """Our state dict in diffusers' layout."""

    def from_diffusers(self, state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
        """Inverse of ``to_diffusers``, but for what follows from the config."""

    def own_unit(self, config: Any) -> Any:
        """The same positions, told in units of the model's own patches where that is possible."""

    def size_arguments(self, config: Any) -> dict[str, Any]:
        """diffusers' arguments, beside the patch size, that put a plain model's patches where they belong."""

    def with_beside(self, config: Any, tensors: Mapping[str, Tensor]) -> Any:
        """The config of weights that have the tensors of ``BESIDE`` too."""

    def held_otherwise(self, config: Any, in_diffusers: bool) -> set[str]:
        """Fields whose difference in the official, or in diffusers' layout makes none."""


_LAYOUTS: dict[str, Layout] = {"DiT": dit, "TextDiT": pixart, "Wan": wan}


def layout_of_config(config: TransformerConfig) -> Layout:
    """That of a model's family."""
    return _LAYOUTS[family_of(config)]


def layout_of_official(state: Mapping[str, Tensor]) -> Layout:
    """That of the family whose names an official state dict has; a DiT's, which says what is missing, if of none."""
    return next((layout for layout in _LAYOUTS.values() if layout.is_official(state)), dit)


def layout_of_class(name: str | None) -> Layout:
    """That of a class of diffusers, or of an official one.

    Raises:
        ValueError: a class that no model here is.
    """
    for layout in _LAYOUTS.values():
        if name is not None and name in (layout.CLASS_NAME, layout.OFFICIAL_CLASS):
            return layout
    known = [n for layout in _LAYOUTS.values() for n in (layout.CLASS_NAME, layout.OFFICIAL_CLASS) if n]
    raise ValueError(f"a {name} is not known here; known are {', '.join(known)}")
