"""The quick start's third story: clips, with adapters in time and in space (paper, sections 3.2 and 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.moving_digits import MovingDigitsDataModule
from flexidit.commands.quickstart.judge import Judge, clip_judge
from flexidit.commands.quickstart.recipe import Recipe, Stage
from flexidit.commands.quickstart.samples import base_is_target, draw_clips
from flexidit.commands.quickstart.schedules import SPATIAL, TEMPORAL, clip_schedules
from flexidit.commands.quickstart.settings import TextToVideoSettings
from flexidit.merged import MergedModel
from flexidit.metrics.curve_candidates import MIXTURE, Candidate
from flexidit.metrics.judges import ClipMotion, MovingDigitAgreement
from flexidit.metrics.moving_digits import moving_prompts
from flexidit.metrics.prompts import Prompts
from flexidit.patch_size import PatchSize
from flexidit.text import WordEncoder
from lightning_modules.pretraining import Pretraining
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings
from lightning_modules.text_to_video import TextToVideo

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer
    from lightning_modules.base import DiffusionModule

_PICTURED = ("a bold three moving right and up", "a thin zero moving left")
_VARIANT = "VideoDiT-Tiny"


class TextToVideoRecipe(Recipe[TextToVideoSettings]):
    """Digits that move as their captions say."""

    plot_title = "Moving digits: how much compute can be saved, in time and in space?"

    @cached_property
    def encoder(self) -> WordEncoder:
        """Of captions; the data have the same."""
        encoder = self.data().text_encoder
        assert isinstance(encoder, WordEncoder)
        return encoder

    def stages(self) -> Sequence[Stage]:
        """Single frames, clips, then both weak modes."""
        steps = self.settings
        return (
            Stage("frames", "image", self.frame_training, self.frames, steps.image_steps),
            Stage("pre-training", "target", self.pretraining, self.data, steps.pretraining_steps),
            Stage("distillation", "student", self.tuning, self.data, steps.distillation_steps),
        )

    def data(self) -> MovingDigitsDataModule:
        """Clips and captions."""
        return self._data(self.settings.batch_size, single_frames=False)

    def frames(self) -> MovingDigitsDataModule:
        """Single frames of the same clips."""
        return self._data(self.settings.image_batch_size, single_frames=True)

    def _data(self, batch_size: int, single_frames: bool) -> MovingDigitsDataModule:
        settings = self.settings
        return MovingDigitsDataModule(
            settings.canvas_size,
            settings.num_frames,
            batch_size=batch_size,
            seed=settings.seed,
            single_frames=single_frames,
        )

    def frame_training(self, _: Path | None) -> DiffusionModule:
        """An image model, from random weights."""
        return self._pretraining(TargetSettings(_VARIANT, self.settings.image_overrides()), self.settings.image_lr)

    def pretraining(self, image: Path | None) -> DiffusionModule:
        """The image model, inflated."""
        target = TargetSettings(_VARIANT, self.settings.variant_overrides(), inflate_from=str(image))
        return self._pretraining(target, self.settings.pretraining_lr)

    def _pretraining(self, target: TargetSettings, lr: float) -> DiffusionModule:
        return Pretraining(
            target, optimizer=OptimizerSettings(lr, warmup_steps=50, decay="cosine"), seed=self.settings.seed
        )

    def tuning(self, target: Path | None) -> DiffusionModule:
        """Distillation into adapters of both weak modes."""
        settings = self.settings
        modes: list[int | str] = [settings.temporal_patch_size, settings.weak_patch_size]
        return TextToVideo(
            TargetSettings(checkpoint=str(target)),
            FlexSettings(modes, recipe="lora", rank=settings.rank),
            optimizer=OptimizerSettings(settings.distillation_lr, 1e-2, warmup_steps=50, decay="cosine"),
            seed=settings.seed,
        )

    def judge(self) -> Judge:
        """Classifiers of frames."""
        return clip_judge(self.settings)

    def schedules(self, model: Any) -> Sequence[Candidate]:
        """Each mode first, both, weak last, fewer steps."""
        return clip_schedules(model, self.settings)

    def sampled(self, student: FlexiTransformer) -> MergedModel:
        """The adapters merged into copies, where they cost nothing."""
        return MergedModel(student)

    def conditions(self, seed: int) -> Prompts:
        """Captions of real digits in random directions: other ones for each seed."""
        texts = moving_prompts(self.settings.num_samples, seed)
        return Prompts.encode(texts, self.encoder, name="captions of moving digits")

    def judges(self, judge: Judge) -> Sequence[Any]:
        """What measuring the samples confirms of their captions, and how smoothly they move."""
        return (MovingDigitAgreement(judge.classifier.logits), ClipMotion())

    def draw_samples(self, model: Any, out: Path) -> list[str]:
        """Two captions at the full budget, and with the strongest saving of each kind that ends with small patches."""
        found = self.schedules(model)
        base = PatchSize.parse(self.settings.patch_size)
        refined = [one for one in found if one.budget < 1 and one.schedule.steps[-1].cond == base]
        strongest = {one.series: one for one in refined if one.series in (SPATIAL, TEMPORAL, MIXTURE)}
        candidates = [max(found, key=lambda one: one.budget), *strongest.values()]
        draw_clips(model, candidates, self.settings, self.encoder.encode(_PICTURED), _PICTURED, out)
        return ["samples.gif", "samples.png"]

    def promise(self, target: FlexiTransformer, student: FlexiTransformer) -> str:
        """That at its own patch size the trained student still draws the target's samples."""
        return base_is_target(target, student, self.settings, self.encoder.encode(_PICTURED))

    def steps(self) -> list[str]:
        """The three trainings."""
        settings = self.settings
        base, temporal, spatial = settings.patch_size, settings.temporal_patch_size, settings.weak_patch_size
        return [
            "The captions are true: class, stroke weight, slant and width were measured on each of scikit-learn's "
            f"digits, which then bounce on a canvas of {settings.canvas_size}x{settings.canvas_size} pixels for "
            f"{settings.num_frames} frames; the direction is that in which a digit sets off.",
            f"A text-conditional transformer ({settings.depth} layers, width {settings.hidden_size}, rectified flow) "
            f"learned single frames with patches of {base}: {settings.image_steps} steps. Its weights were inflated to "
            f"clips, whose tokens all attend to one another, and trained on: {settings.pretraining_steps} steps.",
            f"Two adapters of rank {settings.rank}, for patches of {temporal} (half of the tokens) and {spatial} (four "
            "of nine), each with an embedding and a de-embedding of its own, were distilled from the frozen model's "
            f"own predictions: {settings.distillation_steps} steps, one mode a step.",
        ]

    def limits(self) -> list[str]:
        """What digits cannot tell."""
        return [
            "Text: the share of what captions say (class, weight, slant, width, direction) that measuring the clips "
            "confirms. Captions of other clips would be confirmed to 19 %, of clips of the same class to 46 %.",
        ]

    def example(self, out: Path) -> str:
        """One caption."""
        return f'flexidit sample {out}/student.safetensors --text-encoder words --prompts "a bold seven moving left"'


RECIPE = TextToVideoRecipe
