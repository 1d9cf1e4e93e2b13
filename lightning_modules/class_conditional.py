"""Full fine-tuning of a flexible class-conditional transformer (paper, sections 3.1 and 4.1, appendices B.1 and C.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.diffusion.mmd import bootstrapped_mmd_loss, sample_time_pair
from flexidit.models.dit import DiT
from flexidit.patch_size import PatchSize
from flexidit.recipes import added_parameters, flexify
from lightning_modules.base import DiffusionModule, stream_seed
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings


class ClassConditional(DiffusionModule):
    """Flexifies a pre-trained target and fine-tunes it: DiT's loss at a drawn patch size, plus the MMD loss of B.1.

    The target's weights become the student's, so that no second copy is in memory.

    Args:
        target: the pre-trained model.
        flex: weak patch sizes and recipe.
        matching: the distribution-matching loss.
        optimizer: AdamW and its learning rate.
        patch_size_weights: how often each patch size is drawn, relative to the others; null draws all equally often.
        gradient_checkpointing: recompute each block in backward instead of keeping its activations.
        compile: compile each block, one graph per patch size.
        vae: local path or hub id of the VAE that decodes samples for pictures and metrics; null: pixels are modelled.
        seed: of patch sizes, timesteps, noise and label dropout.

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
        vae: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            target=target,
            flex=flex or FlexSettings(),
            optimizer=optimizer,
            patch_size_weights=patch_size_weights,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            vae=vae,
            seed=seed,
        )
        self.matching = matching or MatchingSettings()
        self.chain_diffusion = GaussianDiffusion().respaced(self.matching.num_timesteps)

    def build_model(self) -> DiT:
        target = cast(DiT, self.target_settings.build())
        if target.config.flex is not None:  # a flexible checkpoint: further fine-tuning
            return target
        assert self.flex_settings is not None
        student = flexify(target, **vars(self.flex_settings), keep_target=False)
        count, share = added_parameters(student)
        self.print_once(f"flexify ({self.flex_settings.recipe}): {count:,} new parameters, {share:.4%} of the target's")
        return student

    def print_once(self, text: str) -> None:
        """Print on rank 0 only, without disturbing a progress bar."""
        if self._trainer is None or self.trainer.is_global_zero:
            print(text)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self._matches_now():
            return loss
        plan = self.matching.plan(self.model.patch_sizes)
        mmd = self.matching_loss(batch)
        self.log("train/mmd", mmd.detach())
        forwards = {size: num_steps for size, num_steps in plan.stages}
        chain = sum(self._forward_flops(size) * num_steps for size, num_steps in forwards.items())
        # Half of the batch goes through the chain; backward through its last steps costs twice their forward.
        self.step_flops += (chain + 2 * self._backward_flops()) // 2
        return loss + self.matching.weight * mmd

    def matching_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Squared MMD between the batch's first half, noised, and its second half, noised further and denoised."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        plan = self.matching.plan(self.model.patch_sizes)
        pair_seed = stream_seed(self.seed, step, 0, "time_pair")  # no rank: chains must be equally long everywhere
        times = sample_time_pair(
            self.chain_diffusion.num_timesteps,
            len(plan),
            generator=torch.Generator().manual_seed(pair_seed),
            location=self.matching.location,
            scale=self.matching.scale,
        )
        half = len(batch["x"]) // 2
        return bootstrapped_mmd_loss(
            self._denoise,
            self.chain_diffusion,
            batch["x"][:half],
            batch["x"][half : 2 * half],
            batch["y"][half : 2 * half],
            plan=plan,
            times=times,
            generator=self._generator("matching", step),
            backprop_steps=self.matching.backprop_steps,
            estimator=self.matching.estimator,
        )

    def _denoise(self, x_t: Tensor, t: Tensor, y: Tensor, patch_size: PatchSize) -> Tensor:
        kept = torch.zeros_like(y, dtype=torch.bool)  # the chain imitates inference: no label is dropped
        return self.model(x_t, t, y, patch_size=patch_size, drop_ids=kept)

    def _matches_now(self) -> bool:
        settings = self.matching
        step = self.global_step
        return settings.weight > 0 and step >= settings.start_step and step % settings.every_n_steps == 0

    def _backward_flops(self) -> int:
        """Forward FLOPs of the chain's steps that carry gradients."""
        plan = self.matching.plan(self.model.patch_sizes)
        count = self.matching.backprop_steps or plan.num_powerful_steps
        return sum(self._forward_flops(size) for size in list(plan)[-count:])
