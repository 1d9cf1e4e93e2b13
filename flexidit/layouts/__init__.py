"""The public layouts of each family's weights, and which one a model or a file has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from flexidit.config import TextDiTConfig, TransformerConfig
from flexidit.layouts import dit, pixart


class Layout(Protocol):
    """What the module of a family offers."""

    CLASS_NAME: str
    """Of the family in diffusers."""
    FINAL_LINEAR: str
    """diffusers' name of the layer that turns tokens into patches."""
    UNTOLD_BY_DIFFUSERS: tuple[str, ...]
    """Fields of the config that no file of diffusers' layout tells."""

    def config_from_official(self, state: Mapping[str, Tensor], **overrides: Any) -> Any:
        """Read a config off the shapes of an official state dict."""

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


def layout_of_config(config: TransformerConfig) -> Layout:
    """That of a model's family."""
    return pixart if isinstance(config, TextDiTConfig) else dit


def layout_of_official(state: Mapping[str, Tensor]) -> Layout:
    """That of the family whose names an official state dict has."""
    return pixart if pixart.is_official(state) else dit


def layout_of_class(name: str | None) -> Layout:
    """That of a class of diffusers.

    Raises:
        ValueError: a class that no model here is.
    """
    known: dict[str, Layout] = {dit.CLASS_NAME: dit, pixart.CLASS_NAME: pixart}
    if name not in known:
        raise ValueError(f"a {name} is not known here; known are {', '.join(known)}")
    return known[name]
