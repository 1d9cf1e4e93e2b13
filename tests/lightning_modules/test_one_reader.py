"""Who reads the weights, and what becomes of errors; real processes are in tests/distributed."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy

from flexidit import create_model, flexify
from lightning_modules.one_reader import device_of, read_once, read_target
from lightning_modules.settings import TargetSettings


class Rank(ModelParallelStrategy):
    """A strategy whose messages go through a mailbox, that ranks can be asked one after another."""

    def __init__(self, rank: int, mailbox: list[bytes]) -> None:
        super().__init__(2, 1)
        self.rank, self.mailbox = rank, mailbox

    @property
    def is_global_zero(self) -> bool:
        return self.rank == 0

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.rank == src:
            self.mailbox.append(pickle.dumps(obj))
        return pickle.loads(self.mailbox.pop(0)) if self.rank != src else obj


class Unsendable(Exception):
    """An error that pickle loses."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def refuse() -> None:
    raise AssertionError("only rank 0 reads")


def test_a_sharded_model_is_read_by_rank_0_alone() -> None:
    mailbox: list[bytes] = []
    assert read_once(Rank(0, mailbox), lambda: 3) == 3
    assert read_once(Rank(1, mailbox), refuse) == 3


@pytest.mark.parametrize("strategy", [None, SingleDeviceStrategy()])
def test_without_sharding_every_process_reads(strategy: Any) -> None:
    assert read_once(strategy, lambda: 3) == 3


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (FileNotFoundError("there is no checkpoint at x"), FileNotFoundError),
        (ValueError("there is no checkpoint at x"), ValueError),
        (Unsendable("there is no checkpoint", "at x"), RuntimeError),
    ],
)
def test_an_error_reaches_all_ranks(raised: Exception, kind: type[Exception]) -> None:
    def fail() -> None:
        raise raised

    mailbox: list[bytes] = []
    with pytest.raises(type(raised)) as own:
        read_once(Rank(0, mailbox), fail)
    assert own.value is raised
    with pytest.raises(kind, match="there is no checkpoint at x"):
        read_once(Rank(1, mailbox), refuse)


def test_other_ranks_have_the_model_without_its_weights(tiny_text: TargetSettings) -> None:
    mailbox: list[bytes] = []
    target, source = read_target(tiny_text, Rank(0, mailbox))
    empty, same_source = read_target(tiny_text, Rank(1, mailbox))
    assert (empty.config, same_source, empty.training) == (target.config, source, target.training)
    assert all(p.is_meta for p in empty.parameters())
    shapes = [[(name, p.shape, p.dtype, p.requires_grad) for name, p in m.named_parameters()] for m in (target, empty)]
    assert shapes[0] == shapes[1]


def test_what_is_added_to_a_model_without_weights_has_none() -> None:
    with torch.device("meta"):
        target = create_model("Wan-Tiny")
    with device_of(target):
        student = flexify(target, ["1x4x4"], "lora", rank=2)
    assert all(p.is_meta for p in student.parameters())
    with device_of(create_model("Wan-Tiny")):
        assert not torch.ones(1).is_meta
