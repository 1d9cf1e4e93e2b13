"""The quick start's second story: captions, and an adapter distilled from the model itself (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from datamodules.captioned_digits import CaptionedDigitsDataModule
from flexidit.commands.quickstart.judge import Judge, image_judge
from flexidit.commands.quickstart.recipe import Recipe, Stage
from flexidit.commands.quickstart.samples import base_is_target, draw_images
from flexidit.commands.quickstart.schedules import image_schedules
from flexidit.commands.quickstart.settings import TextToImageSettings
from flexidit.digit_images import load_digit_images
from flexidit.merged import MergedModel
from flexidit.metrics.curve_candidates import Candidate
from flexidit.metrics.digit_attributes import prompts, real_captions
from flexidit.metrics.judges import DigitAgreement
from flexidit.metrics.prompts import Prompts
from flexidit.text import WordEncoder
from lightning_modules.pretraining import Pretraining
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings
from lightning_modules.text_to_image import TextToImage

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer
    from lightning_modules.base import DiffusionModule

_PICTURED = (
    "a bold narrow zero",
    "a thin zero",
    "a wide one leaning left",
    "a narrow one",
    "a thin three",
    "a bold three",
    "a seven leaning left",
    "a seven leaning right",
    "an upright bold nine",
    "a narrow nine leaning left",
)


class TextToImageRecipe(Recipe[TextToImageSettings]):
    """Digits with captions that were measured: class, stroke weight, slant, width."""

    plot_title = "Captioned digits: how much compute can be saved?"

    @cached_property
    def encoder(self) -> WordEncoder:
        """Of captions; the data have the same."""
        encoder = self.data().text_encoder
        assert isinstance(encoder, WordEncoder)
        return encoder

    def data(self) -> CaptionedDigitsDataModule:
        """Images and captions."""
        return CaptionedDigitsDataModule(batch_size=self.settings.batch_size, seed=self.settings.seed)

    def stages(self) -> Sequence[Stage]:
        """From random weights, then an adapter."""
        steps = self.settings
        return (
            Stage("pre-training", "target", self.pretraining, self.data, steps.pretraining_steps),
            Stage("distillation", "student", self.tuning, self.data, steps.distillation_steps),
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
            TargetSettings("TextDiT-Tiny/2", self.settings.variant_overrides()),
            optimizer=OptimizerSettings(self.settings.pretraining_lr, warmup_steps=100, decay="cosine"),
            seed=self.settings.seed,
        )

    def tuning(self, target: Path | None) -> DiffusionModule:
        """Distillation into adapters of the weak size."""
        settings = self.settings
        return TextToImage(
            TargetSettings(checkpoint=str(target)),
            FlexSettings([settings.weak_patch_size], recipe="lora", rank=settings.rank, positions="corners"),
            optimizer=OptimizerSettings(settings.distillation_lr, 1e-2, warmup_steps=50, decay="cosine"),
            distill_variance=True,  # DDPM samples with it
            seed=settings.seed,
        )

    def sampled(self, student: FlexiTransformer) -> MergedModel:
        """The adapter merged into a copy, where it costs nothing."""
        return MergedModel(student)

    def conditions(self, seed: int) -> Prompts:
        """Captions of real digits, drawn at random: other ones for each seed."""
        texts = prompts(self.settings.num_samples, seed)
        return Prompts.encode(texts, self.encoder, name="captions of real digits")

    def judges(self, judge: Judge) -> Sequence[Any]:
        """What measuring the samples confirms of their captions."""
        return (DigitAgreement(judge.classifier.logits),)

    def draw_samples(self, model: Any, out: Path) -> list[str]:
        """One caption a class, above it real digits that have it."""
        x, _ = load_digit_images()
        captions = real_captions()
        real = torch.stack([x[next(i for i, own in enumerate(captions) if text in own)] for text in _PICTURED])
        y, candidates = self.encoder.encode(_PICTURED), self.schedules(model)
        draw_images(model, candidates, self.settings, y, real, _PICTURED, out / "samples.png")
        return ["samples.png"]

    def promise(self, target: FlexiTransformer, student: FlexiTransformer) -> str:
        """That at its own patch size the trained student still draws the target's samples."""
        return base_is_target(target, student, self.settings, self.encoder.encode(_PICTURED))

    def steps(self) -> list[str]:
        """The two trainings."""
        settings = self.settings
        weak, powerful = settings.weak_patch_size, settings.patch_size
        return [
            "The captions are true: class, stroke weight, slant and width were measured on each of scikit-learn's "
            "digits and are named where they are remarkable. Words enter as fixed random vectors, a stand-in for a "
            "text encoder.",
            f"A text-conditional transformer ({settings.depth} layers, width {settings.hidden_size}, cross-attention, "
            f"adaLN-single) was trained on 8x8 pixels with patches of {powerful}x{powerful}: "
            f"{settings.pretraining_steps} steps.",
            f"An adapter of rank {settings.rank} for patches of {weak}x{weak}, with an embedding and a de-embedding of "
            f"its own, was distilled from the frozen model's own predictions: {settings.distillation_steps} steps.",
        ]

    def limits(self) -> list[str]:
        """What digits cannot tell."""
        return [
            "Text: the share of what captions say (class, weight, slant, width) that measuring the samples "
            "confirms. Captions of other digits would be confirmed to 22 %, of other digits of the class to 61 %.",
        ]

    def example(self, out: Path) -> str:
        """One caption."""
        return f'flexidit sample {out}/student.safetensors --text-encoder words --prompts "a bold seven leaning right"'


RECIPE = TextToImageRecipe
