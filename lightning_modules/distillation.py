"""Adapters for weak patch sizes, distilled from the model's own predictions at its base patch size (section 3.2).

Shape legend: N samples of one process, C channels, O output channels of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexidit.flops import caption_flops, forward_flops
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize
from lightning_modules.base import DiffusionModule
from lightning_modules.draws import SampleDraws
from lightning_modules.settings import ADAPTERS, TABLE_5, FlexSettings, OptimizerSettings, TargetSettings
from lightning_modules.sharding import GatherDtype
from lightning_modules.students import make_student
from lightning_modules.timestep_ranges import parse_ranges


class Distillation(DiffusionModule):
    """Trains adapters of weak patch sizes to predict what the frozen base predicts, of labels or of captions.

    Teacher and student are one model: the teacher's prediction is that of the base patch size, without gradients. Both
    see the same noisy samples and the same conditions, the same ones of them dropped. The loss is the mean squared
    difference of the noise predictions (READING.md, gap 9), or of the velocities of a flow. Both weight noise levels as
    the base's own training did, so that an error costs the student what it cost its teacher. (Of clean latents, which
    differ by sigma times what velocities differ by, those near the data would hardly count.)

    Where the model learns a variance, the weak sizes' variance channels are not trained unless ``distill_variance``:
    the solver "ddpm" uses them.

    Args:
        target: the pre-trained model.
        flex: weak patch sizes and their adapters.
        optimizer: AdamW and its learning rate; default: Table 5.
        distill_variance: compare the variance channels too.
        timestep_ranges: restrict patch sizes to step indices from and below, such as ``{4: [400, 1000]}``, or to those
            of their own steps in a schedule, such as "4:60,2:40": trains for that one schedule. 0 is data, 1000 noise
            (of a flow, before its time shift); sizes that are not named train at all of them.
        patch_size_weights: how often each weak patch size is drawn, relative to the others; null: equally often.
        gradient_checkpointing: recompute each block in backward instead of keeping its activations.
        compile: compile each block, one graph per patch size.
        gather_dtype: of sharded weights (fsdp.yaml) while they are used: "float32", as one process has them, or
            "bfloat16" for half the traffic and memory, with ``precision: bf16-mixed``; shards stay float32.
        vae: local path or hub id of the VAE that decodes samples for pictures and metrics; null: pixels are modelled.
        seed: of fresh weights, patch sizes, timesteps, noise and dropped conditions.
        init_from: start a new run from the (averaged) weights of a flexible checkpoint instead of ``target``; ``flex``
            may add weak patch sizes (:mod:`lightning_modules.further`). No resume: that is ``--ckpt_path``.
    """

    def __init__(
        self,
        target: TargetSettings,
        flex: FlexSettings = ADAPTERS,
        optimizer: OptimizerSettings = TABLE_5,
        distill_variance: bool = False,
        timestep_ranges: dict[str, tuple[int, int]] | str | None = None,
        patch_size_weights: dict[str, float] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        gather_dtype: GatherDtype = "float32",
        vae: str | None = None,
        seed: int = 0,
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            target=target,
            flex=flex,
            optimizer=optimizer,
            patch_size_weights=patch_size_weights,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            gather_dtype=gather_dtype,
            vae=vae,
            seed=seed,
            init_from=init_from,
        )
        self.distill_variance = distill_variance
        self.timestep_ranges = timestep_ranges
        self._ranges: dict[PatchSize, range] = {}

    def build_model(self, target: FlexiTransformer) -> FlexiTransformer:
        assert self.flex_settings is not None
        if self.flex_settings.recipe != "lora":
            raise ValueError(
                f"distillation trains adapters beside a frozen base, flex.recipe is {self.flex_settings.recipe!r}: set "
                "it to lora, or train with lightning_modules.ClassConditional"
            )
        student = make_student(target, self.flex_settings)
        self._ranges = parse_ranges(self.timestep_ranges, student.patch_sizes[1:], self.process.num_timesteps)
        return student

    @property
    def resume_settings(self) -> dict[str, Any]:
        names = ("distill_variance", "timestep_ranges")
        return {**super().resume_settings, **{name: getattr(self, name) for name in names}}

    def timesteps_of(self, patch_size: PatchSize) -> range:
        return self._ranges.get(patch_size, super().timesteps_of(patch_size))

    @property
    def judged_patch_sizes(self) -> Sequence[PatchSize]:
        return self.model.patch_sizes[1:]  # the base is judged by itself

    def loss(self, batch: Mapping[str, Any], patch_size: PatchSize, draws: SampleDraws) -> Tensor:
        """Mean squared difference from the base's prediction: scalar."""
        noisy = self.noised(batch, patch_size, draws)
        with torch.no_grad():
            # What blocks read of captions is frozen, so one computation serves teacher and student.
            y = self.model.prepare(noisy.y)
            target = self.model(noisy.x_t, noisy.times, y, patch_size=self.model.base_patch_size)  # (N, O, H, W)
        output = self.model(noisy.x_t, noisy.times, y, patch_size=patch_size)  # (N, O, H, W)
        num_channels = self.model.out_channels if self.distill_variance else self.model.in_channels
        dtype = torch.promote_types(output.dtype, torch.float32)  # bfloat16 would round the difference
        return F.mse_loss(output[:, :num_channels].to(dtype), target[:, :num_channels].to(dtype))

    def _step_flops(self, patch_size: PatchSize) -> int:
        """The teacher forward, the student forward and backward to its tokens, and the caption once for both."""
        teacher, student = (
            forward_flops(self.model, size, merged=False, captions="once")
            for size in (self.model.base_patch_size, patch_size)
        )
        return teacher + 2 * student + caption_flops(self.model)
