"""Runs whose shards are written while they train on, and meet a full disk, a kill or a signal on the way.

``python -m tests.distributed.background_cases FOLDER``, like ``checkpoint_cases``; what must come of them stands in
``test_background_checkpoints.py``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.filesystem import FileSystem

from callbacks.preemption import Preemption
from lightning_modules import checkpoint_io, sharded_saves
from lightning_modules.checkpoint_io import BackgroundCheckpointIO, StreamingCheckpointIO
from lightning_modules.safe_checkpoints import SafeCheckpoints
from lightning_modules.sharded_strategy import ShardedStrategy
from tests.distributed.checkpoint_cases import DISK_FULL, STEPS, fail_at, kill_before_naming, train, worker

FAILING_STEPS = 5


class Progress(Callback):
    """How far this process has trained, for the threads that write meanwhile."""

    def __init__(self) -> None:
        self.step = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.step = trainer.global_step

    def wait_until(self, step: int) -> None:
        end = time.monotonic() + 20
        while self.step < step:
            assert time.monotonic() < end, f"step {step} does not come"
            time.sleep(0.005)


def before_shards(act: Callable[[Path], None]) -> None:
    """Have something happen before a process writes its shards."""
    original = FileSystem.create_stream

    def create(self: Any, path: Any, mode: str) -> Any:
        if Path(path).suffix == ".distcp" and "w" in mode:
            act(Path(path))
        return original(self, path, mode)

    FileSystem.create_stream = create  # type: ignore[method-assign, assignment]


def step_of(path: Path) -> int:
    return int(path.parent.stem.partition("=")[2])


def fit(folder: Path, **options: Any) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)  # generators are in a checkpoint
    strategy = ShardedStrategy(options.pop("shard_over", "job"), save_distributed_checkpoint=True)
    return train(folder, strategy, **{"writer": BackgroundCheckpointIO(), **options})


def at_once(folder: Path, accelerator: str = "cpu") -> dict[str, Any]:
    return fit(folder, writer=StreamingCheckpointIO(), accelerator=accelerator)


def overtaken(folder: Path, accelerator: str = "cpu") -> dict[str, Any]:
    """Shards are written when the weights are those of the next step."""
    progress = Progress()
    before_shards(lambda path: progress.wait_until(min(step_of(path) + 1, STEPS)))
    return fit(folder, callbacks=[progress], accelerator=accelerator)


def copied(folder: Path) -> dict[str, Any]:
    """HSDP: each shard is on two processes."""
    return fit(folder, shard_over=2)


def copied_on(folder: Path) -> dict[str, Any]:
    return fit(folder.parent / "copied_on", shard_over=2, ckpt_path=folder / "step=2.ckpt")


def failing(folder: Path) -> dict[str, Any]:
    """Step 2: the disk of rank 1; 3: of rank 0, for what is not sharded; 4: rank 0 cannot even begin."""
    rank, begin, delete = os.environ["RANK"], sharded_saves.begin, checkpoint_io.delete
    removed: list[tuple[str, list[str]]] = []

    def write(path: Path) -> None:
        time.sleep(0.2)
        if rank == "1" and step_of(path) == 2:
            raise DISK_FULL

    def begin_folder(path: Path) -> Path:
        if path.stem == "step=4":
            raise PermissionError(13, "Permission denied", "a file")
        return begin(path)

    def remove(path: Path) -> None:
        removed.append((path.name, sorted(inner.name for inner in folder.glob("*.ckpt"))))
        delete(path)

    before_shards(write)
    fail_at({3})
    sharded_saves.begin, checkpoint_io.delete = begin_folder, remove
    return {**fit(folder, steps=FAILING_STEPS, save_top_k=1), "removed": removed}


def hopeless(folder: Path) -> dict[str, Any]:
    def write(path: Path) -> None:
        if os.environ["RANK"] == "1":
            raise DISK_FULL

    before_shards(write)
    return fit(folder)


def killed_in_shards(folder: Path) -> dict[str, Any]:
    """While the second checkpoint is written, in the step after it."""

    class Kill(Progress):
        def on_train_batch_start(self, *args: Any) -> None:
            if self.step == 2:
                self.wait_until_it_writes()
                os.killpg(0, signal.SIGKILL)

        def wait_until_it_writes(self) -> None:
            end = time.monotonic() + 20
            while len(begun) < 2 and time.monotonic() < end:
                time.sleep(0.005)

    begun: list[Path] = []

    def write(path: Path) -> None:
        begun.append(path)
        if len(begun) == 2:
            time.sleep(60)

    before_shards(write)
    return fit(folder, callbacks=[Kill()], save_top_k=0, save_last=True)


def killed_in_naming(folder: Path) -> dict[str, Any]:
    kill_before_naming()
    return fit(folder, save_top_k=0, save_last=True)


def restarted(folder: Path) -> dict[str, Any]:
    """As ``--ckpt_path last`` does it."""
    last = folder / "last.ckpt"
    safe = SafeCheckpoints(takes_newest=True, found=last)
    return fit(folder, safe=safe, ckpt_path=last, save_top_k=0, save_last=True)


def preempted(folder: Path) -> dict[str, Any]:
    """Rank 1 gets a signal in the second step; its shards take their time."""

    class Signal(Progress):
        def on_train_batch_start(self, *args: Any) -> None:
            if self.step == 1 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

    before_shards(lambda path: time.sleep(0.5))
    callbacks = [Signal(), Preemption()]
    try:
        fit(folder, callbacks=callbacks, save_top_k=0, save_last=True, every_n_train_steps=100)
    except SIGTERMException as stop:
        return {"code": stop.code, "names": sorted(path.name for path in folder.glob("*.ckpt"))}
    return {}


RUNS = [
    (at_once, "at_once", 2),
    (overtaken, "overtaken", 2),
    (copied, "copied", 4),
    (copied_on, "copied", 4),
    (failing, "failing", 2),
    (hopeless, "hopeless", 2),
    (killed_in_shards, "killed", 2),
    (restarted, "killed", 2),
    (killed_in_naming, "unnamed", 2),
    (preempted, "preempted", 2),
]


if __name__ == "__main__":
    worker(Path(sys.argv[1]), RUNS)
