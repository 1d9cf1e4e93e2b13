"""The quick start's first story: a class-conditional model, fine-tuned as a whole (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from datamodules.digits import DigitsDataModule
from flexidit.commands.quickstart.judge import Judge, image_judge
from flexidit.commands.quickstart.recipe import Recipe, Stage
from flexidit.commands.quickstart.samples import draw_images
from flexidit.commands.quickstart.schedules import image_schedules
from flexidit.commands.quickstart.settings import ClassConditionalSettings
from flexidit.digit_images import load_digit_images
from flexidit.metrics.curve_candidates import Candidate
from flexidit.metrics.judges import ClassAccuracy
from flexidit.metrics.prompts import ClassLabels
from flexidit.recipes import flexify
from lightning_modules.class_conditional import ClassConditional
from lightning_modules.pretraining import Pretraining
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer
    from lightning_modules.base import DiffusionModule


class ClassConditionalRecipe(Recipe[ClassConditionalSettings]):
    """Ten classes of digits."""

    plot_title = "Real digits: how much compute can be saved?"

    def data(self) -> DigitsDataModule:
        """Images and labels."""
        return DigitsDataModule(batch_size=self.settings.batch_size, seed=self.settings.seed)

    def stages(self) -> Sequence[Stage]:
        """From random weights, then with a weak size."""
        steps = self.settings
        return (
            Stage("pre-training", "target", self.pretraining, self.data, steps.pretraining_steps),
            Stage("fine-tuning", "student", self.tuning, self.data, steps.fine_tuning_steps),
        )

    def judge(self) -> Judge:
        """A classifier of images."""
        return image_judge(self.settings)

    def schedules(self, model: Any) -> Sequence[Candidate]:
        """Weak first, weak last, fewer steps."""
        return image_schedules(model, self.settings)

    def pretraining(self, _: Path | None) -> DiffusionModule:
        """DiT's loss from random weights."""
        return Pretraining(
            TargetSettings("DiT-Tiny/2", self.settings.variant_overrides()),
            optimizer=OptimizerSettings(self.settings.pretraining_lr, warmup_steps=100, decay="cosine"),
            seed=self.settings.seed,
        )

    def tuning(self, target: Path | None) -> DiffusionModule:
        """DiT's loss at a drawn patch size, plus distribution matching."""
        settings = self.settings
        return ClassConditional(
            TargetSettings(checkpoint=str(target)),
            FlexSettings([settings.weak_patch_size]),
            MatchingSettings(
                weight=settings.mmd_weight,
                start_step=settings.mmd_start_step,
                every_n_steps=settings.mmd_every_n_steps,
                num_timesteps=settings.num_sampling_steps,
            ),
            OptimizerSettings(settings.fine_tuning_lr, warmup_steps=50, decay="cosine"),
            seed=settings.seed,
        )

    def conditions(self, seed: int) -> ClassLabels:
        """Classes in turn."""
        return ClassLabels(10)

    def judges(self, judge: Judge) -> Sequence[Any]:
        """Whether the classifier sees the digit that was asked for."""
        return (ClassAccuracy(judge.classifier.logits),)

    def draw_samples(self, model: Any, out: Path) -> list[str]:
        """One of each class."""
        x, y = load_digit_images()
        real = torch.stack([x[y == label][0] for label in range(10)])
        names = [str(label) for label in range(10)]
        candidates = self.schedules(model)
        draw_images(model, candidates, self.settings, torch.arange(10), real, names, out / "samples.png")
        return ["samples.png"]

    def promise(self, target: FlexiTransformer, student: FlexiTransformer) -> str:
        """That flexifying preserves the target, before any training."""
        settings = self.settings
        x = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(settings.seed))
        t, y = torch.arange(50, 1000, 95), torch.arange(10)
        fresh = flexify(target, [settings.weak_patch_size]).eval()
        with torch.no_grad():
            before, after = (model(x, t, y, patch_size=settings.patch_size) for model in (target, fresh))
        return (
            f"Before any training the student repeats the target at patch size {settings.patch_size}; the largest "
            f"difference was {float((before - after).abs().max()):.1e}."
        )

    def steps(self) -> list[str]:
        """The two trainings."""
        settings = self.settings
        weak, powerful = settings.weak_patch_size, settings.patch_size
        return [
            f"A class-conditional DiT ({settings.depth} layers, width {settings.hidden_size}) was trained on 8x8 "
            f"pixels with patches of {powerful}x{powerful}: {settings.pretraining_steps} steps.",
            f"It was flexified to patches of {weak}x{weak} too (recipe 'shared') and fine-tuned for "
            f"{settings.fine_tuning_steps} steps, one patch size per step, with the distribution-matching loss of "
            f"appendix B.1 from step {settings.mmd_start_step}.",
        ]

    def limits(self) -> list[str]:
        """What digits cannot tell."""
        return [
            "Fewer steps save compute as well, and on images of 8x8 pixels they do as well as weak-first. On digits "
            "upsampled to 16x16 they were found to win: there is no detail that large patches miss and small ones add.",
        ]

    def example(self, out: Path) -> str:
        """Two classes."""
        return f"flexidit sample {out}/student.safetensors --classes 3,7"


RECIPE = ClassConditionalRecipe
