"""Full fine-tuning of a flexible class-conditional transformer (paper, sections 3.1, 4.1, B.1 and C.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.diffusion.mmd import ChainPlan, Estimator, bootstrapped_mmd_loss, sample_time_pair
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize
from lightning_modules.base import DiffusionModule
from lightning_modules.draws import keyed, places
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings
from lightning_modules.sharding import GatherDtype
from lightning_modules.students import make_student


class ClassConditional(DiffusionModule):
    """Flexifies a pre-trained target and fine-tunes it: DiT's loss at a drawn patch size, plus the MMD loss of B.1.

    The target's weights become the student's, so that no second copy is in memory.

    Args:
        target: the pre-trained model.
        flex: weak patch sizes and recipe.
        matching: the distribution-matching loss, of models that predict noise.
        optimizer: AdamW and its learning rate.
        patch_size_weights: how often each patch size is drawn, relative to the others; null draws all that train
            equally often.
        gradient_checkpointing: recompute each block in backward instead of keeping its activations.
        compile: compile each block, one graph per patch size.
        gather_dtype: of sharded weights (fsdp.yaml) while they are used: "float32", as one process has them, or
            "bfloat16" for half the traffic and memory, with ``precision: bf16-mixed``; shards stay float32.
        vae: local path or hub id of the VAE that decodes samples for pictures and metrics; null: pixels are modelled.
        seed: of fresh weights, patch sizes, timesteps, noise and dropped conditions.
        init_from: start a new run from the (averaged) weights of a flexible checkpoint instead of ``target``; ``flex``
            may add weak patch sizes (:mod:`lightning_modules.further`). No resume: that is ``--ckpt_path``.

    Example:
        flexidit fit -c configs/imagenet/class_conditional_xl2.yaml
    """

    def __init__(
        self,
        target: TargetSettings,
        flex: FlexSettings | None = None,
        matching: MatchingSettings | None = None,
        optimizer: OptimizerSettings | None = None,
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
            flex=flex or FlexSettings(),
            optimizer=optimizer,
            patch_size_weights=patch_size_weights,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            gather_dtype=gather_dtype,
            vae=vae,
            seed=seed,
            init_from=init_from,
        )
        self.matching = matching or MatchingSettings()
        self.chain_diffusion: GaussianDiffusion
        self.plan: ChainPlan

    def configure_model(self) -> None:
        super().configure_model()
        if self.matching.weight > 0:
            self.chain_diffusion = self._chain_process()
            self.plan = self._checked_plan()

    @property
    def resume_settings(self) -> dict[str, Any]:
        return {**super().resume_settings, "matching": asdict(self.matching) if self.matching.weight > 0 else None}

    def build_model(self, target: FlexiTransformer) -> FlexiTransformer:
        assert self.flex_settings is not None
        return make_student(target, self.flex_settings)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self._matches_now():
            return loss
        mmd = self.matching_loss(batch, batch_idx)
        self.log_sometimes("train/mmd", mmd)
        self.step_flops += self._chain_flops()
        return loss + self.matching.weight * mmd

    def matching_loss(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Squared MMD between the batch's first half, noised, and its second half, noised further and denoised."""
        settings, diffusion = self.matching, self.chain_diffusion
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        key = (self.seed, "matching", self.global_step, micro_batch)
        times = sample_time_pair(
            diffusion.num_timesteps,
            len(self.plan),
            generator=torch.Generator().manual_seed(keyed(*key)),  # no rank: chains are equally long everywhere
            location=settings.location,
            scale=settings.scale,
        )
        half = _half(batch, settings.estimator)
        keys = (keyed(*key, place) for place in places(0, half, self.global_rank, self.trainer.world_size))
        return bootstrapped_mmd_loss(
            self._denoise,
            diffusion,
            batch["x"][:half],
            batch["x"][half : 2 * half],
            batch["y"][half : 2 * half],
            plan=self.plan,
            times=times,
            generator=[torch.Generator(self.device).manual_seed(one) for one in keys],
            backprop_steps=self._num_backprop_steps,
            estimator=settings.estimator,
        )

    @property
    def _num_backprop_steps(self) -> int:
        """How many of the chain's last steps carry gradients."""
        if self.matching.backprop_steps is not None:
            return self.matching.backprop_steps
        # Where the powerful size is frozen, gradients must reach the weak steps before it.
        return len(self.plan) if self._is_frozen else self.plan.num_powerful_steps

    def _denoise(self, x_t: Tensor, t: Tensor, y: Tensor, patch_size: PatchSize) -> Tensor:
        return self.model(x_t, t, y, patch_size=patch_size)  # as at inference: no label is dropped

    def _matches_now(self) -> bool:
        settings, step = self.matching, self.global_step
        return settings.weight > 0 and step >= settings.start_step and step % settings.every_n_steps == 0

    def _chain_flops(self) -> int:
        """Of one sample of the batch, half of which goes through the chain."""
        costs = [self._forward_flops(size) for size in self.plan]
        backward = (1 if self._is_frozen else 2) * sum(costs[-self._num_backprop_steps :])
        return (sum(costs) + backward) // 2

    def _chain_process(self) -> GaussianDiffusion:
        if not isinstance(self.process, GaussianDiffusion):
            raise ValueError(
                "the matching loss denoises in steps of a diffusion and this model's process is 'flow': set "
                "matching.weight to 0"
            )
        return self.process.respaced(self.matching.num_timesteps)

    def _checked_plan(self) -> ChainPlan:
        plan = self.matching.plan(self.model.patch_sizes)
        for size in plan:
            self.model.check_patch_size(size)
        steps = self.matching.backprop_steps
        if steps is not None and not 1 <= steps <= len(plan):
            raise ValueError(f"matching.backprop_steps is 1 to {len(plan)}, the length of the chain, got {steps}")
        return plan


def _half(batch: Mapping[str, Any], estimator: Estimator) -> int:
    """Samples at each end of the chain."""
    half = len(batch["y"]) // 2
    if half < (2 if estimator == "unbiased" else 1):
        raise ValueError(
            f"the {estimator} matching loss splits the batch in two and needs {4 if estimator == 'unbiased' else 2} "
            f"samples a process or more, got {len(batch['y'])}: raise data.batch_size"
        )
    return half
