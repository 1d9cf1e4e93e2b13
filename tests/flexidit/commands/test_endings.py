"""Callbacks that every run has, and whose error is shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.ema import EMA
from callbacks.preemption import Preemption
from callbacks.rank_errors import RankErrors
from flexidit.commands.endings import blaming_the_first, with_endings


def test_they_are_added_once_errors_first() -> None:
    average = EMA()
    assert [type(callback) for callback in with_endings(average)] == [RankErrors, EMA, Preemption]
    assert [type(callback) for callback in with_endings(None)] == [RankErrors, Preemption]
    own = Preemption(every_n_steps=10)
    found = with_endings([own, average])
    assert found[1:] == [own, average]
    assert isinstance(found[0], RankErrors)


def test_a_consequence_names_its_cause_and_a_cause_itself() -> None:
    errors = RankErrors()
    trainer: Any = SimpleNamespace(callbacks=[EMA(), errors])
    with pytest.raises(KeyError), blaming_the_first(trainer, "fit"):
        raise KeyError("own")
    errors.sentence, errors.is_consequence = "rank 1 failed first", True
    with pytest.raises(SystemExit, match="flexidit fit: rank 1 failed first"), blaming_the_first(trainer, "fit"):
        raise KeyError("own")
