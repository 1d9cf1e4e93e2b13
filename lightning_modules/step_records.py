"""What is remembered of an optimizer step until the host may know how it went.

A GPU works a step or so behind the host. To ask it how a step went, right after giving it, is to wait for it, in every
step. So the answer is copied without waiting, and read when the next step has been given: it is there by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from flexidit.skips import printable


@dataclass
class StepRecord:
    """One optimizer step of this rank."""

    step: int
    patch_size: str
    names: Sequence[Sequence[str]]
    """Of the samples, by micro-batch."""
    values: Tensor
    """(1 + micro-batches,) gradient norm and losses, on the host once ``ready`` has happened."""
    ready: Any = None
    """CUDA event after the copy; None: there is nothing to wait for."""

    @classmethod
    def of(
        cls, step: int, patch_size: str, names: Sequence[Sequence[str]], norm: Tensor, losses: Sequence[Tensor]
    ) -> StepRecord:
        """Start to copy what the device will find."""
        values = torch.stack([value.float() for value in (norm, *losses)])
        if values.device.type != "cuda":
            return cls(step, patch_size, names, values)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return cls(step, patch_size, names, host, ready)

    def read(self) -> tuple[float, list[float]]:
        """(gradient norm, losses by micro-batch)."""
        if self.ready is not None:
            self.ready.synchronize()
        norm, *losses = self.values.tolist()
        return norm, losses


@dataclass(frozen=True)
class LeftOut:
    """A step that was left out, as this rank knows it."""

    step: int
    patch_size: str
    bad: Sequence[str]
    """Samples of the micro-batches whose loss was not finite."""
    samples: Sequence[str]
    """Of the whole step."""

    @classmethod
    def of(cls, record: StepRecord, losses: Sequence[float]) -> LeftOut:
        """Tell the micro-batches apart."""
        bad = [name for loss, names in zip(losses, record.names, strict=True) if not isfinite(loss) for name in names]
        return cls(record.step, record.patch_size, bad, [name for names in record.names for name in names])


def describe(everywhere: Sequence[LeftOut], limit: int = 16) -> str:
    """What was wrong where, in part of a sentence.

    Args:
        everywhere: the same step as each rank knows it, in their order.
        limit: of sample names a rank.

    Example:
        >>> describe([LeftOut(3, "1x4x4", ["a.jpg"], ["a.jpg", "b.jpg"])])
        'at patch size 1x4x4 the loss was not finite of rank 0 (a.jpg)'
    """
    bad = {rank: left.bad for rank, left in enumerate(everywhere) if left.bad}
    what = "the loss" if bad else "the gradient, though no loss,"
    found = bad or {rank: left.samples for rank, left in enumerate(everywhere)}
    where = ", ".join(f"rank {rank} ({_listed(names, limit)})" for rank, names in found.items())
    return f"at patch size {everywhere[0].patch_size} {what} was not finite of {where}"


def _listed(names: Sequence[str], limit: int) -> str:
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*map(printable, names[:limit]), *more])
