"""Quality against compute: samples at several schedules, a Frechet distance each, and the record of how.

Shape legend: N samples of one candidate, n samples in one batch, C channels, H W height and width.

For one process or many: :class:`Evaluation` is what ``flexidit curve``, the quick start and the
``fid_flops`` callback run. FID baselines of one checkpoint differ between papers by more than the methods do, so every
point carries the evaluator, the reference, the sample count, the sampler, the guidance and the seed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flexidit import flops
from flexidit.metrics.curve_points import CurvePoint, find_point
from flexidit.metrics.features import FeatureExtractor
from flexidit.metrics.frechet import FeatureStatistics, Gaussian
from flexidit.patch_size import PatchSize, PatchSizeLike
from flexidit.sampling.sampler import Sampler
from flexidit.sampling.schedule import PatchSchedule

Series = Literal["weak first", "weak last", "fewer steps"]
"""The paper's schedule; its counter-example (Fig. 19); the target alone with fewer steps (Fig. 6 right)."""


class Decoder(Protocol):
    """The half of a codec that an evaluation needs."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [-1, 1]."""


@dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn, apart from the schedule."""

    num_samples: int = 50_000
    """Samples N per point; a Frechet distance falls with N, so compare at equal N only."""
    batch_size: int = 64
    """Samples in one forward pass (twice as many sequences with guidance)."""
    solver: str = "ddpm"
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1: none."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels (3: official DiT); None: all."""
    seed: int = 0
    merged: bool = False
    """Price adapters as merged into the weights, where they cost nothing; False prices what runs."""
    autocast: torch.dtype | None = None
    """Run the model under autocast to this type."""


@dataclass(frozen=True)
class Candidate:
    """A schedule that is measured."""

    schedule: PatchSchedule
    series: str
    """The line of the plot that it belongs to, a :data:`Series` or any other name."""
    budget: float
    """Relative FLOPs that were asked for; what the schedule really costs is measured."""


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


class SampledBatch(NamedTuple):
    """Samples of this rank."""

    pixels: Tensor
    """(n, C, H, W) in [-1, 1]."""
    labels: Tensor
    """(n,)"""
    seconds: float
    """Sampling time, without decoding."""
    num_sampled: int
    """Samples that were drawn in that time; more than n where ranks are evened out."""


def candidates(
    model: Any,
    budgets: Iterable[float],
    num_steps: int,
    series: Series = "weak first",
    weak: PatchSizeLike | None = None,
    merged: bool = False,
) -> list[Candidate]:
    """Schedules nearest to each budget, in the given order.

    Args:
        model: What is priced: a model or its config.
        budgets: FLOPs relative to the base patch size at all ``num_steps``; 1.0 is that itself.
        num_steps: Steps of the full budget; ``"fewer steps"`` takes its share of them.
        series: How compute is saved.
        weak: Patch size of the cheap steps; None: the largest of the model.
        merged: See :attr:`SamplingSettings.merged`.

    Raises:
        ValueError: a budget that the patch sizes do not reach, or an unknown series.
    """
    base = base_patch_size(model)

    def schedule(budget: float) -> PatchSchedule:
        if series == "fewer steps" or budget == 1.0:
            return PatchSchedule.constant(base, max(1, math.floor(budget * num_steps + 0.5)))
        order = _ORDERS[series]
        return flops.schedule_for_budget(model, budget, num_steps, weak=weak, order=order, merged=merged)

    if series not in (*_ORDERS, "fewer steps"):
        raise ValueError(f"unknown series {series!r}; give 'weak first', 'weak last' or 'fewer steps'")
    return [Candidate(schedule(budget), series, budget) for budget in budgets]


_ORDERS: dict[str, Literal["weak_first", "weak_last"]] = {"weak first": "weak_first", "weak last": "weak_last"}


@torch.no_grad()
def reference_of(
    batches: Iterable[Mapping[str, Tensor]],
    codec: Decoder,
    features: FeatureExtractor,
    description: str,
    max_samples: int | None = None,
) -> Reference:
    """Statistics of real images that arrive as model inputs ``{"x": (n, C, H, W)}``, over all ranks' batches.

    Latents are decoded first: the distance then leaves out what the VAE itself loses.

    Args:
        batches: This rank's share of the images.
        codec: Turns ``x`` into pixels.
        features: The evaluator.
        description: Which images these are; their number is added.
        max_samples: Stop there, summed over ranks.
    """
    rank, world_size = _rank_and_world_size()
    limit = None if max_samples is None else max_samples // world_size + (rank < max_samples % world_size)
    statistics, device = FeatureStatistics(), _device_of(features)
    for batch in batches:
        x = batch["x"] if limit is None else batch["x"][: limit - statistics.count]
        statistics.update(features(codec.decode(x.to(device))))
        if statistics.count == limit:
            break
    result = statistics.gathered().gaussian(features.fingerprint)
    return Reference(result, f"{description} ({result.count} samples)")


def sample_pixels(
    model: Any, codec: Decoder, schedule: PatchSchedule, settings: SamplingSettings
) -> Iterator[SampledBatch]:
    """This rank's share of N samples, class i mod num_classes for the i-th of them.

    The i-th sample has the i-th seed of a generator, whichever rank and batch it falls into: results do not depend
    on the number of ranks. All ranks make equally many calls of equal size, also where N does not divide by their
    number (a sharded model would wait for ever otherwise); what is too much is dropped.
    """
    rank, world_size = _rank_and_world_size()
    share = math.ceil(settings.num_samples / world_size)
    first = rank * share
    num_batches = math.ceil(share / settings.batch_size)
    width = math.ceil(share / num_batches)  # even batches: the sampler fills up the last one to this width
    sampler = make_sampler(model, schedule, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    torch.randint(2**63 - 1, (first,), generator=generator)  # the seeds of the ranks before
    for start in range(first, first + share, width):
        indices = torch.arange(start, min(start + width, first + share))
        labels = indices % model.num_classes
        began = _now(model)
        latents = sampler(labels, generator=generator, batch_size=width)
        seconds = _now(model) - began
        real = max(0, min(len(indices), settings.num_samples - start))
        yield SampledBatch(_decode(codec, latents[:real]), labels[:real].to(latents.device), seconds, len(indices))


def make_sampler(model: Any, schedule: PatchSchedule, settings: SamplingSettings) -> Sampler:
    """The sampler that these settings describe."""
    return Sampler(
        model,
        settings.solver,
        schedule=schedule,
        cfg_scale=settings.cfg_scale,
        guidance_channels=settings.guidance_channels,
        autocast=settings.autocast,
    )


def cost_per_image(model: Any, schedule: PatchSchedule, settings: SamplingSettings) -> int:
    """FLOPs of one sample, the guiding calls included where any are made."""
    guided = make_sampler(model, schedule, settings).is_guided
    return flops.schedule_cost(model, schedule, guided=guided, merged=settings.merged).total


def full_cost_per_image(model: Any, num_steps: int, settings: SamplingSettings) -> int:
    """FLOPs of one sample at the base patch size throughout: what 100 % stands for."""
    return cost_per_image(model, PatchSchedule.constant(base_patch_size(model), num_steps), settings)


def base_patch_size(model: Any) -> PatchSize:
    """The pre-trained, most powerful size of a model or a config."""
    return next(iter(flops.forward_costs(model)))


@dataclass(frozen=True)
class Evaluation:
    """All that the points of one curve have in common.

    Raises:
        ValueError: the reference was computed in other features.
    """

    model: Any
    """A flexible model with ``config``, ``num_classes`` and what the sampler needs."""
    codec: Decoder
    features: FeatureExtractor
    reference: Reference
    settings: SamplingSettings
    full_steps: int
    """Number of steps at the base patch size that 100 % of the FLOPs stand for."""
    classifier: Callable[[Tensor], Tensor] | None = None
    """Pixels to class scores (n, num_classes), for the accuracy."""
    model_name: str = ""
    """For the record: which weights; an interrupted curve continues only with the same."""

    def __post_init__(self) -> None:
        known = self.reference.statistics.fingerprint
        if known is not None and known != self.features.fingerprint:
            raise ValueError(
                f"the reference was computed with the features {known}, the samples would be with "
                f"{self.features.fingerprint}; compute the reference again or use its extractor"
            )

    def curve(self, candidates: Iterable[Candidate], done: Sequence[CurvePoint] = ()) -> Iterator[CurvePoint]:
        """Measure one candidate after the other; each point arrives, equal on all ranks, as soon as it is known.

        Args:
            candidates: The schedules, from :func:`candidates`.
            done: Points of an earlier, interrupted run: handed out again instead of measured.
        """
        for candidate in candidates:
            yield find_point(done, self._record(candidate)) or self.measure(candidate)

    @torch.no_grad()
    def measure(self, candidate: Candidate) -> CurvePoint:
        """Sample, extract, compare. Every rank must call it."""
        statistics, hits, seconds, num_sampled = FeatureStatistics(), 0, 0.0, 0
        for batch in sample_pixels(self.model, self.codec, candidate.schedule, self.settings):
            seconds, num_sampled = seconds + batch.seconds, num_sampled + batch.num_sampled
            if len(batch.labels):
                statistics.update(self.features(batch.pixels))
                hits += self._hits(batch)
        all_hits, all_seconds, all_sampled = _sum_over_ranks(hits, seconds, num_sampled)
        cost = cost_per_image(self.model, candidate.schedule, self.settings)
        return CurvePoint(
            **self._record(candidate),
            relative_flops=cost / full_cost_per_image(self.model, self.full_steps, self.settings),
            flops_per_image=cost,
            frechet=_distance(statistics.gathered(), self.reference.statistics),
            accuracy=None if self.classifier is None else all_hits / self.settings.num_samples,
            seconds_per_image=all_seconds / all_sampled,
        )

    def _hits(self, batch: SampledBatch) -> int:
        if self.classifier is None:
            return 0
        return int((self.classifier(batch.pixels).argmax(dim=1) == batch.labels).sum())

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
            "fingerprint": self.features.fingerprint,
            "reference": self.reference.description,
            "model": self.model_name,
            "codec": _codec_name(self.codec),
            "solver": settings.solver,
            "cfg_scale": settings.cfg_scale,
            "guidance_channels": settings.guidance_channels,
            "precision": str(settings.autocast or _dtype_of(self.model)).removeprefix("torch."),
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "device": _device_name(_device_of(self.model)),
        }


def _decode(codec: Decoder, latents: Tensor) -> Tensor:
    return codec.decode(latents) if len(latents) else latents


def _distance(statistics: FeatureStatistics, reference: Gaussian) -> float:
    """On rank 0, for all: the matrix roots of 2048 features take a CPU several seconds."""
    result = [statistics.gaussian().distance(reference) if _rank_and_world_size()[0] == 0 else math.nan]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def _sum_over_ranks(*values: float) -> list[float]:
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return [sum(column) for column in zip(*everyone, strict=True)]


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _now(model: Any) -> float:
    """Seconds, once the device has done what it was told."""
    device = _device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _device_of(module: object) -> torch.device:
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def _dtype_of(module: object) -> torch.dtype:
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return torch.float32 if parameter is None else parameter.dtype


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _codec_name(codec: object) -> str:
    fingerprint = getattr(codec, "fingerprint", None)
    if isinstance(fingerprint, Mapping):
        weights = str(fingerprint.get("weights_sha256", ""))[:8]
        return f"{fingerprint.get('class', type(codec).__name__)} {weights}".rstrip()
    return type(codec).__name__ if fingerprint is None else str(fingerprint)
