"""The global generators in a checkpoint: plain values that bring back every stream, and another number of processes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.generators import gather_generators, read_generators, restore_generators, write_generators

CPU = torch.device("cpu")


def draw() -> list[float]:
    """From all generators; one normal number leaves a second one behind in two of them."""
    normal = [random.gauss(0, 1), float(np.random.randn()), torch.randn(()).item()]
    return [*normal, random.random(), float(np.random.rand()), torch.rand(()).item()]


def scramble(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _isolated() -> object:
    before = read_generators(CPU)
    yield
    write_generators(before, CPU)


@pytest.mark.parametrize("drawn", [0, 1])
def test_states_survive_a_checkpoint_and_bring_back_all_streams(tmp_path: Path, drawn: int) -> None:
    scramble(1)
    for _ in range(drawn):
        draw()
    torch.save(gather_generators(read_generators(CPU)), tmp_path / "states.pt")
    expected = [draw() for _ in range(3)]
    scramble(2)
    restore_generators(torch.load(tmp_path / "states.pt", weights_only=True), CPU, rank=0, world_size=1, key=(0, 5))
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("saved", [0, 3])
def test_on_another_number_of_processes_all_start_anew_and_it_is_said(saved: int) -> None:
    def start(rank: int, step: int) -> list[float]:
        with pytest.warns(UserWarning, match="anew: the checkpoint holds (none|those of 3 processes) and this"):
            restore_generators([read_generators(CPU)] * saved, CPU, rank=rank, world_size=2, key=(0, step))
        return draw()

    first = start(0, 5)
    scramble(3)
    assert start(0, 5) == first  # a function of seed, step and rank
    assert start(1, 5) != first
    assert start(0, 6) != first
