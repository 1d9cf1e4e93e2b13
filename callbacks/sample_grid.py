"""Samples as training sees them: the same noise every time, one row per schedule."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.breaking_off import BrokenOffError
from callbacks.conditions import conditions_of
from callbacks.evaluation import autocast_dtype, codec_of, log_directory, model_of, sampling, tensorboards
from callbacks.preemption import Preemption
from callbacks.sample_pictures import SampleRow, picture_path, write_samples
from callbacks.schedules import mode_of, schedules_of
from flexidit.metrics.curve import SamplingSettings, cost_per_image, full_cost_per_image, make_sampler
from flexidit.metrics.curve_candidates import MIXTURE, Candidate
from flexidit.metrics.curve_samples import solver_name
from flexidit.metrics.prompts import ClassLabels, Prompts

_TITLE_LENGTH = 80  # characters of a caption above its column


class SampleGrid(Callback):
    """Writes ``samples/step_00001000.png`` into the run's folder, and the same picture to TensorBoard.

    Of clips the picture is a contact sheet, and there is a ``.gif`` beside it, in which all clips move; TensorBoard has
    it as the image ``clips``.

    Samples are drawn with the EMA weights (put ``EMA`` before this callback), from noise that depends on ``seed``
    alone: from row to row only the budget changes, from picture to picture only the weights. Every rank samples, as a
    sharded model needs; rank 0 writes.

    Columns are classes, or captions: by their texts where these are known, else by their numbers.

    Args:
        budgets: FLOPs of each row relative to the base patch size at every step; 1.0 is that itself.
        every_n_steps: Draw after every so many optimizer steps; null: not.
        every_n_epochs: Draw after every so many epochs; null: not. A last picture is drawn at the end in any case.
        classes: Labels of the columns; null: ``num_columns`` labels spread evenly over all classes.
        prompts: Captions of the columns, for the data's text encoder; null: the first ``num_columns`` of the validation
            data.
        num_columns: Number of columns if neither of both is given.
        num_per_class: Samples of each of these labels or captions.
        solver: See ``flexidit.Sampler``; null: the first one for the model's process.
        num_sampling_steps: Denoising steps of every row.
        cfg_scale: Guidance; 1: none.
        guidance_channels: Guide only the first so many latent channels; null: all.
        weak_patch_size: Patch size of the cheap steps, or a list of them; null: the largest of the model.
        seed: Of the noise.
        schedules: Rows beside the budgets, such as ``1x4x4:12,2x2x2:6,1x2x2:6``.
        fps: Frames per second of clips.
    """

    def __init__(
        self,
        budgets: Sequence[float] = (1.0, 0.6),
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        classes: Sequence[int] | None = None,
        num_columns: int = 8,
        num_per_class: int = 1,
        solver: str | None = None,
        num_sampling_steps: int = 50,
        cfg_scale: float = 1.5,
        guidance_channels: int | None = None,
        weak_patch_size: int | str | Sequence[int | str] | None = None,
        seed: int = 0,
        prompts: Sequence[str] | None = None,
        schedules: Sequence[str] = (),
        fps: float = 8.0,
    ) -> None:
        if not budgets:
            raise ValueError("a grid has one row per budget: give at least one, such as 1.0")
        if any(n is not None and n < 1 for n in (every_n_steps, every_n_epochs)):
            raise ValueError(f"intervals are at least 1, got every_n_steps={every_n_steps}, {every_n_epochs=}")
        self.budgets, self.schedules, self.fps = tuple(budgets), tuple(schedules), fps
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.classes, self.prompts = classes, prompts
        self.num_columns, self.num_per_class = num_columns, num_per_class
        self.num_sampling_steps = num_sampling_steps
        self.weak_patch_size = weak_patch_size
        self.settings = SamplingSettings(
            solver=solver, cfg_scale=cfg_scale, guidance_channels=guidance_channels, seed=seed
        )
        self._conditions: ClassLabels | Prompts | None = None
        self._drawn_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        preemption = Preemption.of(trainer)
        if preemption is not None and preemption.breaks_picture_off:  # in the run that this one continues
            self.draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch + 1
        preemption = Preemption.of(trainer)
        if step == 0 or (preemption is not None and preemption.is_continued_here(trainer)):
            return  # the first step accumulates its batches
        # Not at the end of the epoch: Lightning does not go on well from a checkpoint of that moment.
        ends = self.every_n_epochs is not None and trainer.is_last_batch and epoch % self.every_n_epochs == 0
        if ends or (self.every_n_steps is not None and step % self.every_n_steps == 0):
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draw(trainer, pl_module)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last picture, if it is not there."""
        path = picture_path(log_directory(trainer) / "samples", trainer.global_step)
        if not trainer.strategy.broadcast(path.exists()):
            self.draw(trainer, pl_module)

    def draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample and write, once a step: accumulated batches and the end of an epoch share theirs.

        A picture that a signal breaks off is drawn by the run that continues.
        """
        if trainer.global_step == self._drawn_at:
            return
        with suppress(BrokenOffError):
            self._write(trainer, self.sample_rows(trainer, pl_module), solver_name(model_of(pl_module), self.settings))
            self._drawn_at = trainer.global_step

    def _write(self, trainer: Trainer, rows: Sequence[SampleRow], solver: str) -> None:
        folder, step = log_directory(trainer) / "samples", trainer.global_step
        if trainer.is_global_zero:
            how = f"{solver}, {self.num_sampling_steps} steps, guidance {self.settings.cfg_scale:g}"
            title = f"step {step}: {how}, seed {self.settings.seed}"
            write_samples(rows, self._column_names(), title, step, folder, tensorboards(trainer), self.fps)

    def sample_rows(self, trainer: Trainer, pl_module: LightningModule) -> list[SampleRow]:
        """One row of samples per schedule. Every rank must call it."""
        model, settings = model_of(pl_module), replace(self.settings, autocast=autocast_dtype(trainer))
        full_cost = full_cost_per_image(model, self.num_sampling_steps, settings)
        columns, conditions = self._columns(trainer, model)
        y = conditions.told(columns)
        rows = []
        with sampling(trainer, pl_module):
            for candidate in self._candidates(model):
                sampler = make_sampler(model, candidate.schedule, settings)
                noise = torch.Generator().manual_seed(settings.seed)
                latents = sampler(y, negative=conditions.negative, generator=noise)
                cost = cost_per_image(model, candidate.schedule, settings) / full_cost
                pixels = codec_of(pl_module).decode(latents).cpu()
                rows.append(SampleRow(pixels, _label(candidate), f"{cost:.1%} of the FLOPs"))
        return rows

    def _candidates(self, model: Any) -> list[Candidate]:
        """Each schedule once, though several patch sizes share the full budget."""
        args = (self.budgets, self.num_sampling_steps, self.weak_patch_size, self.schedules)
        found = schedules_of(model, *args)
        if len({candidate.series for candidate in found}) == 1:
            return found
        first: dict[str, Candidate] = {}
        for candidate in found:
            first.setdefault(str(candidate.schedule), candidate)
        return list(first.values())

    def _columns(self, trainer: Trainer, model: Any) -> tuple[torch.Tensor, ClassLabels | Prompts]:
        """Which of the conditions stand in the columns, (K,), and those conditions, the same at every call."""
        if self._conditions is None:
            self._conditions = conditions_of(trainer, model, self.num_columns, self.prompts)
        return torch.tensor(self._chosen()), self._conditions

    def _chosen(self) -> list[int]:
        """Labels, or places of captions."""
        if isinstance(self._conditions, ClassLabels):
            return self._labels(self._conditions.num_classes)
        assert self._conditions is not None
        count = len(self.prompts) if self.prompts is not None else min(self.num_columns, len(self._conditions))
        return [place for place in range(count) for _ in range(self.num_per_class)]

    def _column_names(self) -> list[str]:
        """Labels; captions where their texts are known, else their numbers."""
        texts = getattr(self._conditions, "texts", None)
        if texts is not None:
            return [textwrap.shorten(texts[place], _TITLE_LENGTH, placeholder=" ...") for place in self._chosen()]
        return [str(chosen) for chosen in self._chosen()]

    def _labels(self, num_classes: int) -> list[int]:
        classes = self.classes
        if classes is None:
            count = min(self.num_columns, num_classes)
            classes = [index * num_classes // count for index in range(count)]
        return [label for label in classes for _ in range(self.num_per_class)]


def _label(candidate: Candidate) -> str:
    mode = mode_of(candidate.series, candidate.budget)
    if mode == MIXTURE:
        return str(candidate.schedule)
    return f"budget {candidate.budget:g}{mode and ', ' + mode}"
