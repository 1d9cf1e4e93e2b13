"""Training loops as Lightning modules, one file a recipe."""

from lightning_modules.class_conditional import ClassConditional
from lightning_modules.distillation import Distillation
from lightning_modules.pretraining import Pretraining
from lightning_modules.text_to_image import TextToImage
from lightning_modules.text_to_video import TextToVideo

__all__ = ["ClassConditional", "Distillation", "Pretraining", "TextToImage", "TextToVideo"]
