"""Training from scratch: a plain transformer, or one that is flexible from its first step."""

from __future__ import annotations

from flexidit.models import FlexiTransformer
from lightning_modules.base import DiffusionModule
from lightning_modules.students import make_student


class Pretraining(DiffusionModule):
    """Trains a transformer of labels or captions with DiT's loss from random weights (or continues from given ones).

    One whose config says ``process="flow"`` learns velocities instead. With ``flex`` it has several patch sizes from
    the start, which the paper leaves as future work (appendix C.2); only recipe "shared" makes sense there.

    Example:
        flexidit fit -c configs/quickstart/pretraining.yaml
    """

    def build_model(self, target: FlexiTransformer) -> FlexiTransformer:
        flex = self.flex_settings
        if flex is None:
            return target
        if flex.recipe == "lora":
            raise ValueError("pre-training with recipe 'lora' would train adapters of random weights; use 'shared'")
        return make_student(target, flex)
