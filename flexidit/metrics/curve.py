"""Quality against compute: samples at several schedules, a Frechet distance each, and the record of how.

Shape legend: N samples of one candidate, n samples in one batch, C channels, F frames, H W height and width. Samples
are images (n, C, H, W) or clips (n, C, F, H, W).

For one process or many, for models of classes and of captions: :class:`Evaluation` is what ``flexidit curve``, the
quick starts and the ``fid_flops`` callback run. FID baselines of one checkpoint differ between papers by more than the
methods do, so every point carries the evaluator, the reference, the sample count, the sampler, the guidance and the
seed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flexidit import flops
from flexidit.metrics.curve_candidates import Candidate, base_patch_size
from flexidit.metrics.curve_points import CurvePoint, find_point
from flexidit.metrics.curve_samples import (
    Decoder,
    SamplingSettings,
    classes_of,
    device_of,
    dtype_of,
    make_sampler,
    rank_and_world_size,
    sample_pixels,
    solver_name,
)
from flexidit.metrics.features import FeatureExtractor
from flexidit.metrics.frechet import FeatureStatistics, Gaussian
from flexidit.metrics.judges import ClassAccuracy, Judge, Tally
from flexidit.metrics.prompts import Conditions
from flexidit.sampling.schedule import PatchSchedule


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    statistics: Gaussian
    description: str
    """For the record: which images, how many, from which file."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reference:
        """Statistics of an ``.npz``; see :meth:`Gaussian.load`."""
        statistics = Gaussian.load(path)
        count = "" if statistics.count is None else f" ({statistics.count} samples)"
        return cls(statistics, f"{Path(path).name}{count}")


@torch.no_grad()
def reference_of(
    batches: Iterable[Mapping[str, Tensor]],
    codec: Decoder,
    features: FeatureExtractor,
    description: str,
    max_samples: int | None = None,
) -> Reference:
    """Statistics of real images or clips that arrive as model inputs ``{"x": (n, ...)}``, over all ranks' batches.

    Latents are decoded first: the distance then leaves out what the VAE itself loses.

    Args:
        batches: This rank's share of the images or clips.
        codec: Turns ``x`` into pixels.
        features: The evaluator.
        description: Which images or clips these are; the number of their features is added, F a clip where each frame
            has its own.
        max_samples: Stop there, summed over ranks.
    """
    rank, world_size = rank_and_world_size()
    limit = None if max_samples is None else max_samples // world_size + (rank < max_samples % world_size)
    statistics, device, num_seen = FeatureStatistics(), device_of(features), 0
    for batch in batches:
        x = batch["x"] if limit is None else batch["x"][: limit - num_seen]
        statistics.update(features(codec.decode(x.to(device))))
        num_seen += len(x)
        if num_seen == limit:
            break
    result = statistics.gathered().gaussian(features.fingerprint)
    return Reference(result, f"{description} ({result.count} samples)")


def cost_per_image(model: Any, schedule: PatchSchedule, settings: SamplingSettings) -> int:
    """FLOPs of one sample, the guiding calls included where any are made."""
    guided = make_sampler(model, schedule, settings).is_guided
    return flops.schedule_cost(model, schedule, guided=guided, merged=settings.merged).total


def full_cost_per_image(model: Any, num_steps: int, settings: SamplingSettings) -> int:
    """FLOPs of one sample at the base patch size throughout: what 100 % stands for."""
    return cost_per_image(model, PatchSchedule.constant(base_patch_size(model), num_steps), settings)


@dataclass(frozen=True)
class Evaluation:
    """All that the points of one curve have in common.

    Raises:
        ValueError: a reference was computed in other features, or there are features of frames without a reference.
    """

    model: Any
    """A flexible model with ``config`` and what the sampler needs."""
    codec: Decoder
    features: FeatureExtractor
    """Of images, or of whole clips: :class:`~flexidit.metrics.clip_features.ClipFeatures`, or a network for clips."""
    reference: Reference
    settings: SamplingSettings
    full_steps: int
    """Number of steps at the base patch size that 100 % of the FLOPs stand for."""
    classifier: Callable[[Tensor], Tensor] | None = None
    """Pixels to class scores (n, num_classes): short for a :class:`ClassAccuracy` among the judges."""
    model_name: str = ""
    """For the record: which weights; an interrupted curve continues only with the same."""
    conditions: Conditions | None = None
    """What samples are asked for, such as :class:`Prompts`; None: the model's classes in turn."""
    judges: Sequence[Judge] = ()
    """Who compares samples with that: :class:`DigitAgreement`, :class:`CLIPScore`, ..."""
    frame_features: FeatureExtractor | None = None
    """For clips, of their frames: :class:`~flexidit.metrics.clip_features.FrameFeatures`; None: not measured."""
    frame_reference: Reference | None = None
    """In these features."""

    def __post_init__(self) -> None:
        if (self.frame_features is None) != (self.frame_reference is None):
            raise ValueError("features of frames need a reference in them: give frame_features and frame_reference")
        for features, reference in self._compared:
            known = reference.statistics.fingerprint
            if known is not None and known != features.fingerprint:
                raise ValueError(
                    f"the reference was computed with the features {known}, the samples would be with "
                    f"{features.fingerprint}; compute the reference again or use its extractor"
                )

    def curve(self, candidates: Iterable[Candidate], done: Sequence[CurvePoint] = ()) -> Iterator[CurvePoint]:
        """Measure one candidate after the other; each point arrives, equal on all ranks, as soon as it is known.

        Lines that meet in one schedule, as all do at the full budget, share its measurement.

        Args:
            candidates: The schedules, from :func:`candidates`.
            done: Points of an earlier, interrupted run: handed out again instead of measured.
        """
        known = list(done)
        for candidate in candidates:
            record = self._record(candidate)
            line = {"series": record.pop("series"), "budget": record.pop("budget")}
            alike = find_point(known, record)
            known.append(self.measure(candidate) if alike is None else replace(alike, **line))
            yield known[-1]

    @torch.no_grad()
    def measure(self, candidate: Candidate) -> CurvePoint:
        """Sample, extract, compare. Every rank must call it."""
        statistics, seconds, num_sampled = [FeatureStatistics() for _ in self._compared], 0.0, 0
        judges = self._judges
        conditions = classes_of(self.model) if self.conditions is None else self.conditions
        tallies = {name: Tally() for judge in judges for name in judge.measures}
        for batch in sample_pixels(self.model, self.codec, candidate.schedule, self.settings, conditions):
            seconds, num_sampled = seconds + batch.seconds, num_sampled + batch.num_sampled
            if not len(batch.indices):
                continue
            for own, (features, _) in zip(statistics, self._compared, strict=True):
                own.update(features(batch.pixels))
            for judge in judges:
                for name, tally in judge(batch.pixels, conditions.wanted(batch.indices)).items():
                    tallies[name] += tally
        all_seconds, all_sampled = _sum_over_ranks(seconds, num_sampled)
        cost = cost_per_image(self.model, candidate.schedule, self.settings)
        results: dict[str, Any] = {"accuracy": None} | _means_over_ranks(tallies)
        distances = [
            _distance(own.gathered(), reference.statistics)
            for own, (_, reference) in zip(statistics, self._compared, strict=True)
        ]
        return CurvePoint(
            **self._record(candidate),
            **results,
            relative_flops=cost / full_cost_per_image(self.model, self.full_steps, self.settings),
            flops_per_image=cost,
            frechet=distances[0],
            frechet_frames=distances[1] if len(distances) > 1 else None,
            seconds_per_image=all_seconds / all_sampled,
        )

    @property
    def _compared(self) -> list[tuple[FeatureExtractor, Reference]]:
        """Each extractor with its reference: the evaluator's, and that of frames."""
        if self.frame_features is None or self.frame_reference is None:
            return [(self.features, self.reference)]
        return [(self.features, self.reference), (self.frame_features, self.frame_reference)]

    @property
    def _judges(self) -> list[Judge]:
        own = [] if self.classifier is None else [ClassAccuracy(self.classifier)]
        return [*own, *self.judges]

    def _record(self, candidate: Candidate) -> dict[str, Any]:
        """What identifies a measurement, apart from its results."""
        settings = self.settings
        return {
            "series": candidate.series,
            "budget": candidate.budget,
            "schedule": str(candidate.schedule),
            "num_sampling_steps": len(candidate.schedule),
            "num_samples": settings.num_samples,
            "evaluator": self.features.name,
            "fingerprint": "; ".join(features.fingerprint for features, _ in self._compared),
            "reference": self.reference.description,
            "model": self.model_name,
            "codec": _codec_name(self.codec),
            "solver": solver_name(self.model, settings),
            "cfg_scale": settings.cfg_scale,
            "guidance_channels": settings.guidance_channels,
            "precision": str(settings.autocast or dtype_of(self.model)).removeprefix("torch."),
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "device": _device_name(device_of(self.model)),
            "conditions": "" if self.conditions is None else self.conditions.description,
            "sample": "clip" if len(self.model.input_size) == 3 else "image",
            "judges": "; ".join(judge.description for judge in self._judges if judge.description),
        }


def _distance(statistics: FeatureStatistics, reference: Gaussian) -> float:
    """On rank 0, for all: the matrix roots of 2048 features take a CPU several seconds."""
    result = [statistics.gaussian().distance(reference) if rank_and_world_size()[0] == 0 else math.nan]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def _sum_over_ranks(*values: float) -> list[float]:
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return [sum(column) for column in zip(*everyone, strict=True)]


def _means_over_ranks(tallies: Mapping[str, Tally]) -> dict[str, float]:
    sums = _sum_over_ranks(*(value for tally in tallies.values() for value in (tally.total, tally.count)))
    return {name: Tally(sums[2 * place], int(sums[2 * place + 1])).mean for place, name in enumerate(tallies)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _codec_name(codec: object) -> str:
    fingerprint = getattr(codec, "fingerprint", None)
    if isinstance(fingerprint, Mapping):
        weights = str(fingerprint.get("weights_sha256", ""))[:8]
        return f"{fingerprint.get('class', type(codec).__name__)} {weights}".rstrip()
    return type(codec).__name__ if fingerprint is None else str(fingerprint)
