"""One rank fails: all ranks end, soon, and say which it was and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRAINERS = {
    "copies": {"strategy": "ddp"},
    "shards": {"strategy": {"class_path": "lightning_modules.sharded_strategy.ShardedStrategy"}},
}
BOUND = 30
"""Seconds. Gloo notices at once; this is far below its timeout of half an hour."""


def ended(
    folder: Path, fit: Any, write_config: Callable[..., Path], trainer: dict[str, Any], fault: dict[str, Any],
    *options: str,
) -> list[tuple[int | None, str]]:  # fmt: skip
    write_config(folder, **trainer)
    start = time.monotonic()
    fault = {"when": "train", "step": 2, "batch": 0, **fault}
    outcome = fit(folder, *options, world_size=2, fault=fault, timeout=BOUND)
    assert time.monotonic() - start < BOUND
    return outcome


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_ends_all_and_is_the_one_that_is_shown(
    failing: int, trainer: dict[str, Any], tmp_path: Path, fit: Any, write_config: Any
) -> None:
    outcome = ended(tmp_path, fit, write_config, trainer, {"ranks": [failing], "what": "raise"})
    assert [code for code, _ in outcome] == [1, 1], outcome
    assert "RuntimeError: the batch is cursed" in outcome[failing][1]
    other = outcome[1 - failing][1]
    last = other.strip().splitlines()[-1]
    assert last.startswith(f"flexidit fit: rank {failing} on ")
    assert last.endswith("failed first, at step 2: RuntimeError: the batch is cursed")
    assert "Traceback" not in other

    own, consequence = (tmp_path / "run" / "errors" / f"rank{rank:03d}.txt" for rank in (failing, 1 - failing))
    assert "probe.py" in own.read_text()
    assert own.read_text().count("Traceback") == 1
    assert "the batch is cursed" in consequence.read_text()
    assert "onnection" in consequence.read_text()  # and what it met itself


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
def test_a_rank_that_is_killed_ends_the_others(
    trainer: dict[str, Any], tmp_path: Path, fit: Any, write_config: Any
) -> None:
    outcome = ended(tmp_path, fit, write_config, trainer, {"ranks": [1], "what": "SIGKILL"})
    assert [code for code, _ in outcome] == [1, -9], outcome
    assert "rank 0" in (tmp_path / "run" / "errors" / "rank000.txt").read_text()
    assert "it lost another rank, which left no error" in (tmp_path / "run" / "errors" / "rank000.txt").read_text()
    assert not (tmp_path / "run" / "errors" / "rank001.txt").exists()


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(tmp_path: Path, fit: Any, write_config: Any) -> None:
    options = {"timeout": "0:00:03", "find_unused_parameters": True}
    trainer = {"strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": options}}
    outcome = ended(tmp_path, fit, write_config, trainer, {"ranks": [1], "what": "SIGSTOP"})
    assert [code for code, _ in outcome] == [1, 1], outcome
    assert "imed out" in (tmp_path / "run" / "errors" / "rank000.txt").read_text()


def test_cleaning_up_after_an_error_has_a_bound(tmp_path: Path, fit: Any, write_config: Any) -> None:
    options = ["--trainer.callbacks+=callbacks.rank_errors.RankErrors", "--trainer.callbacks.exit_after=3"]
    fault = {"ranks": [1], "what": "raise", "hangs": True}
    outcome = ended(tmp_path, fit, write_config, TRAINERS["copies"], fault, *options)
    assert [code for code, _ in outcome] == [1, 1], outcome
    assert "the batch is cursed" in (tmp_path / "run" / "errors" / "rank000.txt").read_text()
