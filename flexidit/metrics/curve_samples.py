"""Drawing the samples that an evaluation measures: the same ones on any number of ranks, in batches of any size.

Shape legend: N samples of one candidate, n samples in one batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flexidit.metrics.prompts import ClassLabels, Conditions
from flexidit.sampling.sampler import Sampler
from flexidit.sampling.schedule import PatchSchedule


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
    solver: str | None = None
    """See :class:`~flexidit.sampling.sampler.Sampler`; None: that of the model's process."""
    time_shift: float | None = None
    """Of a flow, how far noise levels are shifted; None: as in training."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1: none."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels (3: official DiT); None: all."""
    seed: int = 0
    merged: bool = False
    """Price adapters as merged into the weights, where they cost nothing; False prices what runs."""
    autocast: torch.dtype | None = None
    """Run the model under autocast to this type."""


class SampledBatch(NamedTuple):
    """Samples of this rank."""

    pixels: Tensor
    """(n, C, H, W) in [-1, 1]."""
    indices: Tensor
    """(n,) on the CPU: which samples of the evaluation these are."""
    seconds: float
    """Sampling time, without decoding."""
    num_sampled: int
    """Samples that were drawn in that time; more than n where ranks are evened out."""


def sample_pixels(
    model: Any,
    codec: Decoder,
    schedule: PatchSchedule,
    settings: SamplingSettings,
    conditions: Conditions | None = None,
) -> Iterator[SampledBatch]:
    """This rank's share of N samples.

    The i-th sample has the i-th condition and the i-th seed of a generator, whichever rank and batch it falls into:
    results do not depend on the number of ranks. All ranks make equally many calls of equal size, also where N does not
    divide by their number (a sharded model would wait for ever otherwise); what is too much is dropped.

    Args:
        model: What samples.
        codec: Decodes its samples.
        schedule: Patch size of each step.
        settings: How many, from which seed, ...
        conditions: What they are asked for; None: the model's classes in turn.
    """
    conditions = classes_of(model) if conditions is None else conditions
    rank, world_size = rank_and_world_size()
    share = math.ceil(settings.num_samples / world_size)
    first = rank * share
    num_batches = math.ceil(share / settings.batch_size)
    width = math.ceil(share / num_batches)  # even batches: the sampler fills up the last one to this width
    sampler = make_sampler(model, schedule, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    torch.randint(2**63 - 1, (first,), generator=generator)  # the seeds of the ranks before
    for start in range(first, first + share, width):
        indices = torch.arange(start, min(start + width, first + share))
        told = conditions.told(indices)
        began = _now(model)
        latents = sampler(told, negative=conditions.negative, generator=generator, batch_size=width)
        seconds = _now(model) - began
        real = max(0, min(len(indices), settings.num_samples - start))
        yield SampledBatch(_decode(codec, latents[:real]), indices[:real], seconds, len(indices))


def classes_of(model: Any) -> ClassLabels:
    """The model's classes in turn.

    Raises:
        ValueError: the model is not one of classes.
    """
    num_classes = getattr(model.config, "num_classes", None)
    if num_classes is None:
        raise ValueError("this model is told captions, not classes: give conditions=Prompts(...)")
    return ClassLabels(num_classes)


def make_sampler(model: Any, schedule: PatchSchedule, settings: SamplingSettings) -> Sampler:
    """The sampler that these settings describe."""
    return Sampler(
        model,
        settings.solver,
        schedule=schedule,
        time_shift=settings.time_shift,
        cfg_scale=settings.cfg_scale,
        guidance_channels=settings.guidance_channels,
        autocast=settings.autocast,
    )


def solver_name(model: Any, settings: SamplingSettings) -> str:
    """The solver that these settings come to, in words, for records."""
    return make_sampler(model, PatchSchedule.constant(model.patch_sizes[0], 1), settings).solver_name


def _decode(codec: Decoder, latents: Tensor) -> Tensor:
    return codec.decode(latents) if len(latents) else latents


def rank_and_world_size() -> tuple[int, int]:
    """Of this process; 0 and 1 where it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _now(model: Any) -> float:
    """Seconds, once the device has done what it was told."""
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def device_of(module: object) -> torch.device:
    """Where the module's parameters are; the CPU for a plain callable."""
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def dtype_of(module: object) -> torch.dtype:
    """That of the module's parameters; float32 for a plain callable."""
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return torch.float32 if parameter is None else parameter.dtype
