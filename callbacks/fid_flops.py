"""The paper's curve, while training: Frechet distance against relative FLOPs at a list of budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from callbacks.conditions import conditions_of
from callbacks.evaluation import autocast_dtype, codec_of, log_directory, model_of, sampling, tensorboards
from flexidit.metrics.curve import Evaluation, Reference, SamplingSettings, reference_of
from flexidit.metrics.curve_candidates import candidates
from flexidit.metrics.curve_points import CurvePoint, read_csv, write_csv
from flexidit.metrics.features import FeatureExtractor
from flexidit.metrics.prompts import ClassLabels, Prompts, read_prompts
from flexidit.plots import curve_figure


class FIDFlops(Callback):
    """Samples at each budget with the EMA weights and logs ``val/fid@0.46`` and ``flops/relative@0.46``.

    Also a TensorBoard figure ``val/fid_flops`` of each measurement, and ``fid_flops.csv`` in the run's folder with all
    of them: one row a point, with evaluator, reference, number of samples, sampler, steps, guidance and seed. It runs
    in ``flexidit validate``, after every so many validations of a fit, and at the end of it. The work is split over the
    ranks, and the result does not depend on their number.

    Samples have the model's classes in turn; or captions, of the validation data in turn unless prompts are given.

    "FID" is short for a Frechet distance in whatever features are given; only Inception's compare with published ones.

    Args:
        features: The evaluator, a ``FeatureExtractor`` such as ``flexidit.metrics.features.InceptionFeatures``. (A
            config can name modules, not protocols.)
        reference: An ``.npz`` with ``mu`` and ``sigma``; or "train" or "val" of the run's data.
        reference_samples: Use so many images of the run's data; null: all.
        budgets: FLOPs relative to the base patch size at every step; 1.0 is that itself.
        num_samples: Samples per budget. A Frechet distance falls with their number: compare at equal numbers only.
        every_n_validations: Measure after every so many validations of a fit; null: at its end only.
        batch_size: Samples in one forward pass (twice as many sequences with guidance).
        solver: See ``flexidit.Sampler``; null: the first one for the model's process.
        num_sampling_steps: Denoising steps of every budget.
        cfg_scale: Guidance; 1: none.
        guidance_channels: Guide only the first so many latent channels; null: all.
        weak_patch_size: Patch size of the cheap steps; null: the largest of the model.
        seed: Of the noise.
        prompts: A text file with one prompt a line, for the data's text encoder; null: captions of the validation data,
            with several processes each its own share.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        features: nn.Module,
        reference: str = "val",
        reference_samples: int | None = None,
        budgets: Sequence[float] = (1.0, 0.8, 0.6, 0.46),
        num_samples: int = 10_000,
        every_n_validations: int | None = None,
        batch_size: int = 64,
        solver: str | None = None,
        num_sampling_steps: int = 250,
        cfg_scale: float = 1.5,
        guidance_channels: int | None = None,
        weak_patch_size: int | str | None = None,
        seed: int = 0,
        prompts: str | None = None,
    ) -> None:
        if not budgets or num_samples < 2 or batch_size < 1:
            raise ValueError(
                f"give a budget or more, 2 samples or more and a batch of 1 or more; got budgets={list(budgets)}, "
                f"{num_samples=}, {batch_size=}"
            )
        if every_n_validations is not None and every_n_validations < 1:
            raise ValueError(f"every_n_validations is at least 1, or null, got {every_n_validations}")
        if not isinstance(features, FeatureExtractor):
            raise ValueError(f"{type(features).__name__} is no feature extractor: it needs a name and a fingerprint")
        self.features: FeatureExtractor = features
        self.reference = reference
        self.reference_samples = reference_samples
        self.budgets = tuple(budgets)
        self.every_n_validations = every_n_validations
        self.num_sampling_steps, self.weak_patch_size = num_sampling_steps, weak_patch_size
        self.sampling_arguments: dict[str, Any] = {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "solver": solver,
            "cfg_scale": cfg_scale,
            "guidance_channels": guidance_channels,
            "seed": seed,
        }
        self.prompts = prompts
        self._conditions: ClassLabels | Prompts | None = None
        self._loaded_reference: Reference | None = None
        self._num_validations = 0
        self._measured_at = -1

    def state_dict(self) -> dict[str, Any]:
        return {"num_validations": self._num_validations, "measured_at": self._measured_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_validations = state_dict["num_validations"]
        self._measured_at = state_dict["measured_at"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._num_validations += 1
            if self.every_n_validations is None or self._num_validations % self.every_n_validations:
                return
        # Logged through the module, so that a ModelCheckpoint can monitor "val/fid@0.46".
        pl_module.log_dict(scalars(self.measure(trainer, pl_module)), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._measured_at:
            return
        metrics = scalars(self.measure(trainer, pl_module))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> list[CurvePoint]:
        """Sample, compare, write figure and csv. Every rank must call it; all get the same points."""
        model = model_of(pl_module)
        if isinstance(self.features, nn.Module):
            self.features.to(pl_module.device)
        settings = SamplingSettings(**self.sampling_arguments, autocast=autocast_dtype(trainer))
        with sampling(trainer, pl_module):
            evaluation = Evaluation(
                model=model,
                codec=codec_of(pl_module),
                features=self.features,
                reference=self._reference(trainer, pl_module),
                settings=settings,
                full_steps=self.num_sampling_steps,
                model_name=weights_name(trainer),
                conditions=self._asked(trainer, model),
            )
            schedules = candidates(model, self.budgets, self.num_sampling_steps, weak=self.weak_patch_size)
            points = list(evaluation.curve(schedules))
        self._measured_at = trainer.global_step
        self._write(trainer, points)
        return points

    def _asked(self, trainer: Trainer, model: nn.Module) -> ClassLabels | Prompts:
        if self._conditions is None:
            texts = None if self.prompts is None else read_prompts(self.prompts)
            self._conditions = conditions_of(trainer, model, self.sampling_arguments["num_samples"], texts)
        return self._conditions

    def _write(self, trainer: Trainer, points: list[CurvePoint]) -> None:
        path = log_directory(trainer) / "fid_flops.csv"
        for point in points:
            rank_zero_info(point.describe())
        if trainer.is_global_zero:
            earlier = [point for point in read_csv(path) if point.model != points[0].model]
            write_csv([*earlier, *points], path)
            for board in tensorboards(trainer):
                board.add_figure("val/fid_flops", curve_figure(points, points[0].model), trainer.global_step)

    def _reference(self, trainer: Trainer, pl_module: LightningModule) -> Reference:
        if self._loaded_reference is None:
            if self.reference in ("train", "val"):
                self._loaded_reference = self._reference_of_data(trainer, pl_module)
            else:
                self._loaded_reference = Reference.load(self.reference)
        return self._loaded_reference

    def _reference_of_data(self, trainer: Trainer, pl_module: LightningModule) -> Reference:
        """Statistics of the run's own images, from a fresh loader: the one in use keeps its place."""
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is None:
            raise ValueError(f"reference={self.reference!r} needs a datamodule; give the path of an .npz instead")
        loader = datamodule.train_dataloader() if self.reference == "train" else datamodule.val_dataloader()
        description = f"{type(datamodule).__name__} {self.reference}"
        batches = _model_inputs(loader, datamodule, pl_module.device)
        return reference_of(batches, codec_of(pl_module), self.features, description, self.reference_samples)


def _model_inputs(loader: Any, datamodule: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches as the model sees them: raw images are encoded as in training, their captions are not."""
    for batch in loader:
        if "index" in batch and hasattr(datamodule, "encode_images"):
            batch = {"x": datamodule.encode_images({**batch, "x": batch["x"].to(device)})}
        yield batch


def weights_name(trainer: Trainer) -> str:
    """Which weights are measured: the step of a fit, else the checkpoint that was loaded."""
    if trainer.state.fn == TrainerFn.FITTING:
        return f"step {trainer.global_step}"
    return Path(trainer.ckpt_path).name if trainer.ckpt_path else "initial weights"


def scalars(points: Sequence[CurvePoint]) -> dict[str, float]:
    """Logged values, the budget after the @: ``{"val/fid@0.46": 2.7, "flops/relative@0.46": 0.456}``."""
    distances = {f"val/fid@{point.budget:g}": point.frechet for point in points}
    return distances | {f"flops/relative@{point.budget:g}": point.relative_flops for point in points}
