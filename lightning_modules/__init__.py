"""Training loops as Lightning modules, one file a recipe."""

from lightning_modules.class_conditional import ClassConditional
from lightning_modules.pretraining import Pretraining

__all__ = ["ClassConditional", "Pretraining"]
