"""FlexiDiT: diffusion transformers with several patch sizes (arXiv 2502.20126).

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flexidit import flops
    from flexidit.checkpoint import load_checkpoint, save_checkpoint
    from flexidit.patch_size import PatchSize
    from flexidit.recipes import flexify
    from flexidit.sampling.sampler import Sampler
    from flexidit.sampling.schedule import PatchSchedule
    from flexidit.variants import create_model

_HOMES = {
    "PatchSchedule": "flexidit.sampling.schedule",
    "PatchSize": "flexidit.patch_size",
    "Sampler": "flexidit.sampling.sampler",
    "create_model": "flexidit.variants",
    "flexify": "flexidit.recipes",
    "load_checkpoint": "flexidit.checkpoint",
    "save_checkpoint": "flexidit.checkpoint",
}

__all__ = [
    "PatchSchedule",
    "PatchSize",
    "Sampler",
    "create_model",
    "flexify",
    "flops",
    "load_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "flops":
        return importlib.import_module("flexidit.flops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flexidit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
