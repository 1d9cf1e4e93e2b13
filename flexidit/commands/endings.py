"""How a run ends that does not get to its end: preempted, or because one of its ranks failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer

from callbacks.preemption import Preemption
from callbacks.rank_errors import RankErrors


def with_endings(callbacks: Callback | Sequence[Callback] | None) -> list[Callback]:
    """The callbacks of a config, and those that every run has, unless the config has them with settings of its own."""
    given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
    missing = [kind() for kind in (RankErrors, Preemption) if not any(isinstance(c, kind) for c in given)]
    errors = [callback for callback in [*given, *missing] if isinstance(callback, RankErrors)]
    return errors + [callback for callback in [*given, *missing] if callback not in errors]


@contextmanager
def blaming_the_first(trainer: Trainer, command: str) -> Iterator[None]:
    """In a job of several ranks only the one that failed first shows its error; the others name it, and exit with 1.

    Raises:
        SystemExit: with that sentence, on those others.
    """
    try:
        yield
    except Exception as error:
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        errors = next((callback for callback in callbacks if isinstance(callback, RankErrors)), None)
        if errors is None or not errors.is_consequence:
            raise
        raise SystemExit(f"flexidit {command}: {errors.sentence}") from error
