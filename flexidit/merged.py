"""A flexible model as it is fastest to sample from: each weak size a plain model with its adapter merged.

Shape legend: N batch, C channels, H W latent height and width, O output channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flexidit.conditions import Condition
from flexidit.lora import merged_copy
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize, PatchSizeLike


class MergedModel(nn.Module):
    """Computes what a student of the lora recipe computes, without the FLOPs of its adapters.

    It answers to what samplers and evaluations ask of a model. The price is one copy of the weights per weak size
    (paper, section 3.2, "Inference without LoRAs"). The base size is the student itself.

    Raises:
        ValueError: the student has no adapters.

    Example:
        >>> from flexidit import create_model, flexify
        >>> student = flexify(create_model("DiT-Tiny/2", input_size=8), [4], recipe="lora", rank=2)
        >>> [size.name for size in MergedModel(student).patch_sizes]
        ['1x2x2', '1x4x4']
    """

    def __init__(self, student: FlexiTransformer) -> None:
        super().__init__()
        flex = student.config.flex
        if flex is None or flex.recipe != "lora":
            raise ValueError("this model has no adapters to merge; only models of the lora recipe have some")
        self.config = student.config
        self.patch_sizes = student.patch_sizes
        self.base_patch_size = student.base_patch_size
        self.in_channels, self.out_channels = student.in_channels, student.out_channels
        self.learn_sigma = student.learn_sigma
        self.input_size = student.input_size
        self.student = student
        self.weak = nn.ModuleDict({size.name: merged_copy(student, size) for size in flex.weak_patch_sizes})
        self.train(student.training)

    def forward(self, x: Tensor, t: Tensor, y: Condition, *, patch_size: PatchSizeLike) -> Tensor:
        """(N, C, H, W), (N,), N conditions -> (N, O, H, W)."""
        size: PatchSize = self.student.check_patch_size(patch_size)
        model = self.student if size == self.base_patch_size else self.weak[size.name]
        return model(x, t, y, patch_size=size)

    def null_condition(self, y: Any) -> Any:
        """The condition of the unconditional prediction, as many as ``y``."""
        return self.student.null_condition(y)

    def prepare(self, y: Any) -> Any:
        """What no step and no patch size changes about conditions, computed once: adapters do not touch it."""
        return self.student.prepare(y)
