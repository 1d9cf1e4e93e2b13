"""Long work between two steps of a fit, such as sampling for a metric, which a signal may break off."""

from __future__ import annotations

import time
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer


class BrokenOffError(Exception):
    """A signal has ended what was going on, on all ranks at the same place; the run is about to leave."""


@runtime_checkable
class Finishes(Protocol):
    """A callback with long work at the end of a fit, which a start of its own may have to do."""

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is lacking of it. All ranks call it."""


class Pace:
    """Which of many calls is the next to ask all ranks something, such that they do so about once in ``seconds``.

    Example:
        >>> pace = Pace()
        >>> [pace.is_due() for _ in range(2)]
        [True, True]
        >>> pace.adapt(milliseconds=100)
        >>> [pace.is_due() for _ in range(4)]
        [False, True, False, True]
    """

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self._stride, self._num_calls = 1, 0
        self._asked = time.monotonic()

    def is_due(self) -> bool:
        """Whether this call is one: the same answer on all ranks."""
        self._num_calls += 1
        return self._num_calls % self._stride == 0

    def elapsed(self) -> int:
        """Milliseconds since the last one, on this rank."""
        return int(1000 * (time.monotonic() - self._asked))

    def adapt(self, milliseconds: int) -> None:
        """Another one was made, so long after the one before; all ranks must say the same. Slows down gradually."""
        wanted = int(self._stride * 1000 * self.seconds / max(1, milliseconds))
        self._stride, self._num_calls = max(1, min(wanted, 2 * self._stride)), 0
        self._asked = time.monotonic()
