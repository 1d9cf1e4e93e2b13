"""LoRA distillation of a text-to-image transformer (paper, sections 3.2 and C.2, Table 5)."""

from __future__ import annotations

from flexidit.config import CaptionedConfig
from flexidit.models import FlexiTransformer
from lightning_modules.distillation import Distillation


class TextToImage(Distillation):
    """Distils weak patch sizes of a text-to-image transformer; see :class:`Distillation` for the arguments.

    Table 5: rank 32, AdamW at 8e-4 with weight decay 1e-2 (both are the defaults), a batch of 512, gradients clipped at
    0.02, an average of decay 0.9999 at every step (these are the trainer's and the callbacks'). Captions are dropped as
    in pre-training (``class_dropout_prob``, 10 %), so that weak sizes learn the unconditional prediction too.

    Example:
        flexidit fit -c configs/text_to_image/pixart_256.yaml
    """

    def build_model(self, target: FlexiTransformer) -> FlexiTransformer:
        if not isinstance(target.config, CaptionedConfig):
            raise ValueError(
                f"the target is a {type(target).__name__}, which takes labels: give a TextDiT or PixArt variant or "
                "checkpoint, or train with lightning_modules.Distillation"
            )
        return super().build_model(target)
