"""A signal at any moment, to any rank: a checkpoint at the end of the step, exit code 75, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

DDP = {"strategy": "ddp"}
SAMPLES = {"samples": True, "limit_val_batches": 1}  # 7 calls a picture; then ranks ask before the 1st, 2nd, 6th, ...
FSDP = {"strategy": {"class_path": "lightning_modules.sharded_strategy.ShardedStrategy"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path], fit: Any) -> Callable[..., Path]:
    """Folder of a run that nothing happened to, one for each kind."""
    made: dict[str, Path] = {}

    def make(world_size: int, trainer: dict[str, Any]) -> Path:
        key = f"{world_size} {trainer}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            write_config(made[key], **trainer)
            outcome = fit(made[key], world_size=world_size)
            assert [code for code, _ in outcome] == [0] * world_size, outcome[0][1]
        return made[key]

    return make


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "run").glob("samples/*.png")}


CASES = {
    "one process, in a step": (1, {}, {"when": "train", "step": 4, "ranks": [0], "what": "SIGTERM"}),
    "the step before a validation": (1, {}, {"when": "train", "step": 5, "ranks": [0], "what": "SIGUSR1"}),
    "the last step of an epoch": (
        1, {"limit_train_batches": 4}, {"when": "train", "step": 3, "ranks": [0], "what": "SIGTERM"}
    ),
    "in a validation": (1, {}, {"when": "validation", "step": 3, "ranks": [0], "what": "SIGTERM"}),
    "while gradients accumulate": (
        1, {"accumulate_grad_batches": 2}, {"when": "train", "step": 2, "ranks": [0], "what": "SIGTERM"}
    ),
    "rank 1 of 2": (2, DDP, {"when": "train", "step": 2, "ranks": [1], "what": "SIGTERM"}),
    "both of 2, in a validation": (2, DDP, {"when": "validation", "step": 6, "ranks": [0, 1], "what": "SIGUSR1"}),
    "rank 1 of 2, sharded": (2, FSDP, {"when": "train", "step": 5, "ranks": [1], "what": "SIGTERM"}),
    "rank 1 of 2, in a picture": (
        2, {**DDP, **SAMPLES}, {"when": "sampling", "step": 4, "batch": 1, "ranks": [1], "what": "SIGUSR1"}
    ),
    "rank 1 of 2, sharded, in a metric at the end": (
        2, {**FSDP, **SAMPLES}, {"when": "sampling", "step": 8, "batch": 17, "ranks": [1], "what": "SIGTERM"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("world_size, trainer, fault", CASES.values(), ids=CASES)
def test_a_preempted_run_and_its_continuation_are_the_whole_run(
    world_size: int, trainer: dict[str, Any], fault: dict[str, Any], tmp_path: Path,
    whole: Any, fit: Any, write_config: Any, losses: Any, logged: Any,
) -> None:  # fmt: skip
    write_config(tmp_path, **trainer)
    stopped = fit(tmp_path, world_size=world_size, fault={"batch": 0, **fault})
    assert [code for code, _ in stopped] == [75] * world_size, stopped
    assert f"stopped by {fault['what']}" in stopped[0][1]
    steps = fault["step"] + (fault["when"] == "train")  # of the validation: the step before it is done
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == steps
    assert len({line.split()[0] for line in losses(tmp_path, 0)}) == steps

    continued = fit(tmp_path, world_size=world_size)
    assert [code for code, _ in continued] == [0] * world_size, continued
    expected = whole(world_size, trainer)
    for rank in range(world_size):
        assert losses(tmp_path, rank) == losses(expected, rank)
    assert logged(tmp_path) == logged(expected)
    assert pictures(tmp_path) == pictures(expected)
    assert {step for name, step in logged(tmp_path) if name.startswith("val/")}
