"""Training from scratch: a plain transformer, or one that is flexible from its first step."""

from __future__ import annotations

from typing import cast

from flexidit.models.dit import DiT
from flexidit.recipes import flexify
from lightning_modules.base import DiffusionModule


class Pretraining(DiffusionModule):
    """Trains a class-conditional transformer with DiT's loss from random weights (or continues from given ones).

    With ``flex`` it has several patch sizes from the start, which the paper leaves as future work (appendix C.2); only
    recipe "shared" makes sense there.

    Example:
        flexidit fit -c configs/quickstart/pretraining.yaml
    """

    def build_model(self) -> DiT:
        model, flex = cast(DiT, self.target_settings.build()), self.flex_settings
        if flex is None:
            return model
        if flex.recipe == "lora":
            raise ValueError("pre-training with recipe 'lora' would train adapters of random weights; use 'shared'")
        return flexify(model, **vars(flex), keep_target=False)
