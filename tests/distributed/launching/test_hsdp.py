"""Sharded inside groups and copied between them (HSDP): four processes, two by two, train as one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

STRATEGY = {
    "class_path": "lightning_modules.sharded_strategy.ShardedStrategy",
    "init_args": {"shard_over": 2, "timeout": "0:07:00"},
}
COMMON = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_steps": 4}
WORLD_SIZE = 4


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, write_config: Any, fit: Any) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    write_config(folder, **COMMON)
    assert [code for code, _ in fit(folder)] == [0]
    return folder


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, write_config: Any, fit: Any) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    write_config(folder, **COMMON, strategy=STRATEGY)
    outcome = fit(folder, "--data.init_args.batch_size=16", world_size=WORLD_SIZE)
    assert [code for code, _ in outcome] == [0] * WORLD_SIZE, outcome
    return folder


def test_the_losses_are_those_of_one_process(alone: Path, groups: Path, losses: Any) -> None:
    each = [[float.fromhex(line.split()[1]) for line in losses(groups, rank)] for rank in range(WORLD_SIZE)]
    one = [float.fromhex(line.split()[1]) for line in losses(alone, 0)]
    torch.testing.assert_close(torch.tensor(each).mean(0), torch.tensor(one), rtol=1e-4, atol=1e-5)
    assert len(one) == 2 * COMMON["max_steps"]


def test_the_weights_and_their_average_are_those_of_one_process(alone: Path, groups: Path) -> None:
    one, other = (
        torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True) for folder in (alone, groups)
    )
    for part in (lambda saved: saved["state_dict"], lambda saved: saved["callbacks"]["EMA"]["average"]):
        torch.testing.assert_close(part(other), part(one), rtol=0, atol=2e-5)


def test_consecutive_ranks_share_a_copy(groups: Path) -> None:
    placed = (groups / "run" / "placement_rank0.txt").read_text()
    assert placed == "[[0, 1], [2, 3]] Replicate Shard 0:07:00"  # and wait as long as was asked for


def test_no_step_asks_the_device_whether_to_go_on(groups: Path) -> None:
    """Lightning does, before each batch: a broadcast, and then the host waits for the device."""
    counts = {(groups / "run" / f"broadcasts_rank{rank}.txt").read_text() for rank in range(WORLD_SIZE)}
    assert counts == {"0"}


def test_the_first_rank_alone_writes_logs_and_shows_progress(groups: Path) -> None:
    outputs = [(groups / f"output_rank{rank}.txt").read_text() for rank in range(WORLD_SIZE)]
    assert "4/4" in outputs[0]
    for output in outputs[1:]:
        lines = [line for line in output.splitlines() if line.strip()]
        assert all(line.startswith(("[rank: ", "Initializing distributed: ")) for line in lines), output
    assert len(list((groups / "run").glob("events.*"))) == 1
