"""The paper's curve, while training: Frechet distance against relative FLOPs at a list of budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from callbacks.breaking_off import BrokenOffError
from callbacks.conditions import conditions_of
from callbacks.evaluation import autocast_dtype, codec_of, log_directory, model_of, sampling, tensorboards
from callbacks.preemption import Preemption
from callbacks.schedules import mode_of, schedules_of
from flexidit.metrics.curve import Evaluation, Reference, SamplingSettings, reference_of
from flexidit.metrics.curve_candidates import MIXTURE, Candidate
from flexidit.metrics.curve_points import CurvePoint, read_csv, write_csv
from flexidit.metrics.features import FeatureExtractor
from flexidit.metrics.judges import ClipMotion
from flexidit.metrics.prompts import ClassLabels, Prompts, read_prompts
from flexidit.plots import curve_figure

_SPLITS = ("train", "val")
_CSV = "fid_flops.csv"
_LOGGED = {
    "val/fid": "frechet",
    "val/fid_frames": "frechet_frames",
    "val/flicker": "flicker",
    "val/smoothness": "smoothness",
    "flops/relative": "relative_flops",
}


class FIDFlops(Callback):
    """Samples at each budget with the EMA weights and logs ``val/fid@0.46`` and ``flops/relative@0.46``.

    With several weak patch sizes each has its own, ``val/fid_2x2x2@0.46``; schedules that are given one by one are
    ``val/fid_mixture@0.39``, by what they cost.

    Also a TensorBoard figure ``val/fid_flops`` of each measurement, and ``fid_flops.csv`` in the run's folder with all
    of them: one row a point, with evaluator, reference, number of samples, sampler, steps, guidance and seed. It runs
    in ``flexidit validate``, after every so many validations of a fit, and at the end of it. The work is split over the
    ranks, and the result does not depend on their number.

    Of clips, temporal flicker and motion smoothness are measured too (``val/flicker@0.46``, ``val/smoothness@0.46``),
    and with ``frame_features`` the distance of single frames (``val/fid_frames@0.46``).

    Samples have the model's classes in turn; or captions, of the validation data in turn unless prompts are given.

    "FID" is short for a Frechet distance in whatever features are given; only Inception's compare with published ones.

    Args:
        features: The evaluator, a ``FeatureExtractor`` such as ``flexidit.metrics.features.InceptionFeatures``; of
            clips, ``flexidit.metrics.clip_features.ClipFeatures``. (A config can name modules, not protocols.)
        reference: An ``.npz`` with ``mu`` and ``sigma``; or "train" or "val" of the run's data.
        reference_samples: Use so many images or clips of the run's data; null: all.
        budgets: FLOPs relative to the base patch size at every step; 1.0 is that itself.
        num_samples: Samples per budget. A Frechet distance falls with their number: compare at equal numbers only.
        every_n_validations: Measure after every so many validations of a fit; null: at its end only.
        batch_size: Samples in one forward pass (twice as many sequences with guidance).
        solver: See ``flexidit.Sampler``; null: the first one for the model's process.
        num_sampling_steps: Denoising steps of every budget.
        cfg_scale: Guidance; 1: none.
        guidance_channels: Guide only the first so many latent channels; null: all.
        weak_patch_size: Patch size of the cheap steps, or a list of them, a line each; null: the largest of the model.
        seed: Of the noise.
        prompts: A text file with one prompt a line, for the data's text encoder; null: captions of the validation data,
            with several processes each its own share.
        schedules: Measured beside the budgets, such as ``1x4x4:12,2x2x2:6,1x2x2:6``.
        frame_features: For clips, an evaluator of their frames: ``flexidit.metrics.clip_features.FrameFeatures``.
        frame_reference: As ``reference``, for these; null: the same data.

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
        weak_patch_size: int | str | Sequence[int | str] | None = None,
        seed: int = 0,
        prompts: str | None = None,
        schedules: Sequence[str] = (),
        frame_features: nn.Module | None = None,
        frame_reference: str | None = None,
    ) -> None:
        if not budgets or num_samples < 2 or batch_size < 1:
            raise ValueError(
                f"give a budget or more, 2 samples or more and a batch of 1 or more; got budgets={list(budgets)}, "
                f"{num_samples=}, {batch_size=}"
            )
        if every_n_validations is not None and every_n_validations < 1:
            raise ValueError(f"every_n_validations is at least 1, or null, got {every_n_validations}")
        self.features = _extractor(features)
        self.frame_features = None if frame_features is None else _extractor(frame_features)
        self.reference, self.frame_reference = reference, frame_reference or reference
        if frame_features is not None and self.frame_reference not in _SPLITS and frame_reference is None:
            raise ValueError("frame_features have statistics of their own: give frame_reference beside reference")
        self.reference_samples = reference_samples
        self.budgets, self.schedules = tuple(budgets), tuple(schedules)
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
        self._references: dict[str, Reference] = {}
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
        try:
            metrics = scalars(self.measure(trainer, pl_module))
        except BrokenOffError:
            self._num_validations -= 1  # the run that continues repeats it
            return
        # Logged through the module, so that a ModelCheckpoint can monitor "val/fid@0.46".
        pl_module.log_dict(metrics, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._measured_at:
            return
        with suppress(BrokenOffError):
            metrics = scalars(self.measure(trainer, pl_module))
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what is lacking at the end of the fit."""
        known = {(point.series, point.budget) for point in self._measured_before(trainer)}
        if not {(each.series, each.budget) for each in self._schedules(model_of(pl_module))} <= known:
            self.on_train_end(trainer, pl_module)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> list[CurvePoint]:
        """Sample, compare, write figure and csv. Every rank must call it; all get the same points.

        Each point is in the csv as soon as it is known. The run that continues one which a signal has broken off takes
        it from there.

        Raises:
            BrokenOffError: by a signal, on all ranks.
        """
        model = model_of(pl_module)
        for features in (self.features, self.frame_features):
            if isinstance(features, nn.Module):
                features.to(pl_module.device)
        settings = SamplingSettings(**self.sampling_arguments, autocast=autocast_dtype(trainer))
        with sampling(trainer, pl_module):
            evaluation = Evaluation(
                model=model,
                codec=codec_of(pl_module),
                features=self.features,
                reference=self._reference(trainer, pl_module, self.features, self.reference),
                settings=settings,
                full_steps=self.num_sampling_steps,
                model_name=weights_name(trainer),
                conditions=self._asked(trainer, model),
                judges=[ClipMotion()] if len(model.input_size) == 3 else [],
                frame_features=self.frame_features,
                frame_reference=self._frame_reference(trainer, pl_module),
            )
            points: list[CurvePoint] = []
            for point in evaluation.curve(self._schedules(model), self._measured_before(trainer)):
                points.append(point)
                self._write(trainer, points)
        self._measured_at = trainer.global_step
        for board in tensorboards(trainer):
            board.add_figure("val/fid_flops", curve_figure(points, points[0].model), trainer.global_step)
        return points

    def _schedules(self, model: Any) -> list[Candidate]:
        return schedules_of(model, self.budgets, self.num_sampling_steps, self.weak_patch_size, self.schedules)

    def _asked(self, trainer: Trainer, model: nn.Module) -> ClassLabels | Prompts:
        if self._conditions is None:
            texts = None if self.prompts is None else read_prompts(self.prompts)
            self._conditions = conditions_of(trainer, model, self.sampling_arguments["num_samples"], texts)
        return self._conditions

    def _measured_before(self, trainer: Trainer) -> list[CurvePoint]:
        """Points of these very weights, where they are those of the checkpoint that the fit continues from."""
        preemption, path = Preemption.of(trainer), log_directory(trainer) / _CSV
        if preemption is None or not preemption.is_continued_here(trainer):
            return []
        known = [point for point in read_csv(path) if point.model == weights_name(trainer)]
        return trainer.strategy.broadcast(known)

    def _write(self, trainer: Trainer, points: list[CurvePoint]) -> None:
        path = log_directory(trainer) / _CSV
        rank_zero_info(points[-1].describe())
        if trainer.is_global_zero:
            earlier = [point for point in read_csv(path) if point.model != points[0].model]
            write_csv([*earlier, *points], path)

    def _frame_reference(self, trainer: Trainer, pl_module: LightningModule) -> Reference | None:
        if self.frame_features is None:
            return None
        return self._reference(trainer, pl_module, self.frame_features, self.frame_reference)

    def _reference(
        self, trainer: Trainer, pl_module: LightningModule, features: FeatureExtractor, source: str
    ) -> Reference:
        """Read, or computed from the run's data, once."""
        if features.fingerprint not in self._references:
            self._references[features.fingerprint] = (
                self._reference_of_data(trainer, pl_module, features, source)
                if source in _SPLITS
                else Reference.load(source)
            )
        return self._references[features.fingerprint]

    def _reference_of_data(
        self, trainer: Trainer, pl_module: LightningModule, features: FeatureExtractor, split: str
    ) -> Reference:
        """Statistics of the run's own data, from a fresh loader: the one in use keeps its place."""
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is None:
            raise ValueError(f"reference={split!r} needs a datamodule; give the path of an .npz instead")
        loader = datamodule.train_dataloader() if split == "train" else datamodule.val_dataloader()
        description = f"{type(datamodule).__name__} {split}"
        batches = _model_inputs(loader, datamodule, pl_module.device)
        return reference_of(batches, codec_of(pl_module), features, description, self.reference_samples)


def _extractor(features: nn.Module) -> FeatureExtractor:
    if not isinstance(features, FeatureExtractor):
        raise ValueError(f"{type(features).__name__} is no feature extractor: it needs a name and a fingerprint")
    return features


def _model_inputs(loader: Any, datamodule: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches as the model sees them: raw images and clips are encoded as in training, their captions are not."""
    for batch in loader:
        if batch.get("repeated"):  # for ranks that stay in step
            continue
        if "index" in batch and hasattr(datamodule, "encode_samples"):
            batch = {"x": datamodule.encode_samples({**batch, "x": batch["x"].to(device)})}
        yield batch


def weights_name(trainer: Trainer) -> str:
    """Which weights are measured: the step of a fit, else the checkpoint that was loaded."""
    if trainer.state.fn == TrainerFn.FITTING:
        return f"step {trainer.global_step}"
    return Path(trainer.ckpt_path).name if trainer.ckpt_path else "initial weights"


def scalars(points: Sequence[CurvePoint]) -> dict[str, float]:
    """Logged values, the budget after the @: ``{"val/fid@0.46": 2.7, "flops/relative@0.46": 0.456}``."""
    result: dict[str, float] = {}
    for point in points:
        measured = {name: getattr(point, field) for name, field in _LOGGED.items()}
        mark = _unused_mark(point, result)
        result |= {f"{name}{mark}": value for name, value in measured.items() if value is not None}
    return result


def _unused_mark(point: CurvePoint, taken: Mapping[str, float]) -> str:
    """``"@0.46"``, ``"_2x2x2@0.46"``; mixtures that cost the same are numbered: ``"_mixture2@0.46"``."""
    mode = mode_of(point.series, point.budget)
    names = (f"{mode and '_' + mode}{number}@{point.budget:g}" for number in ("", *range(2, 1000)))
    is_shared = point.series != MIXTURE  # several lines may have the full budget, and mean the same
    return next(name for name in names if is_shared or f"val/fid{name}" not in taken)
