"""What is random in training, as pure functions of (seed, optimizer step, place in the global batch).

No draw depends on the global generator, on validation, on where a run was interrupted, or on how the global batch is
split over processes and accumulated micro-batches: the same run on one device or on eight draws the same.

Shape legend: N samples of one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexidit.patch_size import PatchSize


def keyed(*key: int | str) -> int:
    """A uniform 63-bit number that depends on the whole key, and on nothing else.

    Example:
        >>> keyed(0, "noise", 7) == keyed(0, "noise", 7), keyed(0, "noise", 7) == keyed(0, "noise", 8)
        (True, False)
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_patch_size(sizes: Sequence[PatchSize], weights: Sequence[float], seed: int, step: int) -> PatchSize:
    """The patch size of an optimizer step: the same on every rank without communication, and after a resume.

    Args:
        sizes: what to choose from.
        weights: how often each is chosen, relative to the others; at least one is above 0.
        seed: of the run.
        step: optimizer step.
    """
    point = keyed(seed, "patch_size", step) / 2**63 * sum(weights)
    for size, weight in zip(sizes, weights, strict=True):
        point -= weight
        if point < 0:
            return size
    return [size for size, weight in zip(sizes, weights, strict=True) if weight > 0][-1]  # the sum was rounded


def check_weights(
    given: Mapping[str, float] | None, sizes: Sequence[PatchSize], trained: Sequence[PatchSize]
) -> list[float]:
    """One weight per patch size, for :func:`draw_patch_size`.

    Args:
        given: weights by name, 0 for sizes without; None draws all that train equally often.
        sizes: all sizes of the model.
        trained: those that train.

    Raises:
        ValueError: weights of sizes that the model lacks or does not train, negative ones, or none above 0.
    """
    if given is None:
        return [float(size in trained) for size in sizes]
    weights = {PatchSize.parse(size): weight for size, weight in given.items()}
    used = {size for size, weight in weights.items() if weight > 0}
    if not used or used - set(trained) or set(weights) - set(sizes) or min(weights.values()) < 0:
        raise ValueError(
            f"patch_size_weights are {given}; give numbers that are 0 or more, and not all 0, to the patch sizes that "
            f"train: {', '.join(size.name for size in trained)}"
        )
    return [weights.get(size, 0.0) for size in sizes]


@dataclass(frozen=True)
class SampleDraws:
    """Timesteps, noise and dropped conditions of some samples of a step, keyed by their places in the global batch."""

    seed: int
    """Of the run."""
    stream: str
    """What the draws are for; other streams are independent."""
    step: int
    """Optimizer step, or 0 for draws that never change."""
    places: Sequence[int]
    """(N,): places of this process's samples in the global batch."""

    def timesteps(self, indices: range, device: torch.device) -> Tensor:
        """Step indices, uniform over the given ones: (N,) int64."""
        return _to_device(torch.tensor([indices[key % len(indices)] for key in self._keys("timestep")]), device)

    def dropped(self, probability: float, device: torch.device) -> Tensor:
        """Which conditions are dropped: (N,) bool."""
        return _to_device(torch.tensor([key / 2**63 < probability for key in self._keys("dropout")]), device)

    def noise_like(self, x: Tensor) -> Tensor:
        """Standard normal noise with the shape, dtype and device of ``x``: (N, ...)."""
        generator = torch.Generator(x.device)
        noise = torch.empty_like(x)
        for sample, key in zip(noise, self._keys("noise"), strict=True):
            sample.normal_(generator=generator.manual_seed(key))
        return noise

    def _keys(self, what: str) -> list[int]:
        return [keyed(self.seed, self.stream, self.step, what, place) for place in self.places]


def places(first: int, count: int, rank: int, world_size: int) -> range:
    """Places in the global batch of one process's samples: processes take turns, as distributed samplers deal them.

    Args:
        first: samples that this process had before, of the same step.
        count: N.
        rank: of this process.
        world_size: number of processes.

    Example:
        >>> list(places(0, 3, rank=1, world_size=2))
        [1, 3, 5]
    """
    return range(first * world_size + rank, (first + count) * world_size, world_size)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    # A blocking copy would wait for all work that the device has still to do.
    return values.to(device, non_blocking=True)
