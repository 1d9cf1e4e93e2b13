"""Runs of several processes that save and load together, and meet a full disk, a kill or damage on the way.

``python -m tests.distributed.checkpoint_cases FOLDER`` imports everything once, and forks the processes of each run.
What must come of them stands in ``test_checkpoints.py``.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from callbacks.ema import EMA
from datamodules.digits import DigitsDataModule
from lightning_modules import ClassConditional, checkpoint_io, sharded_saves
from lightning_modules.checkpoint_io import StreamingCheckpointIO
from lightning_modules.safe_checkpoints import SafeCheckpoints
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings
from lightning_modules.sharded_strategy import ShardedStrategy
from tests.distributed.processes import free_port

TINY = {"input_size": 8, "in_channels": 1, "num_classes": 10, "depth": 2, "hidden_size": 32, "num_heads": 2}
GLOBAL_BATCH, STEPS = 8, 3
DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Record(Callback):
    """Losses, and the weights at the end, gathered."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = pl_module.state_dict().items()
        self.weights = {name: v.full_tensor() if isinstance(v, DTensor) else v.clone() for name, v in values}


def train(
    folder: Path, strategy: Any, steps: int = STEPS, safe: SafeCheckpoints | None = None, **options: Any
) -> dict[str, Any]:
    """Some steps with a checkpoint after each; what went wrong, in words."""
    world_size, ckpt_path = int(os.environ["WORLD_SIZE"]), options.pop("ckpt_path", None)
    writer, further = options.pop("writer", None) or StreamingCheckpointIO(), options.pop("callbacks", [])
    accelerator = options.pop("accelerator", "cpu")
    module = ClassConditional(
        TargetSettings(checkpoint=str(folder.parent / "target.safetensors")),
        FlexSettings([4]),
        optimizer=OptimizerSettings(lr=1e-2),
    )
    safe = safe or SafeCheckpoints()
    trainer = pl.Trainer(
        accelerator=accelerator,
        deterministic=True,
        devices=world_size,
        strategy=strategy,
        max_steps=steps,
        plugins=[writer],
        callbacks=[
            safe,
            record := Record(),
            EMA(0.8),
            *further,
            ModelCheckpoint(folder, "{step}", **{"every_n_train_steps": 1, "save_top_k": -1, **options}),
        ],
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, DigitsDataModule(batch_size=GLOBAL_BATCH // world_size), ckpt_path=ckpt_path)
        except (OSError, ValueError) as raised:
            error = str(raised)
    said = [str(warning.message) for warning in caught if "could not be" in str(warning.message)]
    found = {"error": error, "warnings": said, "step": trainer.global_step, "path": str(trainer.ckpt_path)}
    return {**found, "losses": record.losses, "weights": record.weights}


def results_of(folder: Path, name: str, world_size: int = 2) -> list[dict[str, Any]]:
    """What the processes of a run came to."""
    paths = [folder / f"{name}_{rank}_of_{world_size}.pt" for rank in range(world_size)]
    assert all(path.exists() for path in paths), (folder / "messages.txt").read_text()[-5000:]
    return [torch.load(path, weights_only=True) for path in paths]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sharded() -> ShardedStrategy:
    return ShardedStrategy(save_distributed_checkpoint=True)


def fail_at(steps: set[int]) -> None:
    """The disk is full for rank 0, the only one to write files."""
    original = checkpoint_io._save_to

    def save(sink: Any, checkpoint: Any) -> None:
        if checkpoint["global_step"] in steps:
            raise DISK_FULL
        original(sink, checkpoint)

    checkpoint_io._save_to = save


def full_disk(folder: Path) -> dict[str, Any]:
    fail_at({2})
    return train(folder, DDPStrategy(find_unused_parameters=True), save_top_k=1)


def never(folder: Path) -> dict[str, Any]:
    fail_at(set(range(100)))
    return train(folder, DDPStrategy(find_unused_parameters=True))


def no_link(folder: Path) -> dict[str, Any]:
    """Rank 0, the only one to make links, cannot make the second."""
    original = Path.symlink_to

    def refuse(self: Path, target: Any, *args: Any) -> None:
        if "step=2" in str(target):
            raise DISK_FULL
        original(self, target, *args)

    Path.symlink_to = refuse  # type: ignore[method-assign]
    return train(folder, DDPStrategy(find_unused_parameters=True), save_top_k=-1, save_last="link")


def several(folder: Path) -> dict[str, Any]:
    return train(folder, DDPStrategy(find_unused_parameters=True))


def newest(folder: Path) -> dict[str, Any]:
    """The checkpoint that each process found for itself is damaged; and they found different ones."""
    found = folder / f"step={3 - int(os.environ['RANK'])}.ckpt"
    safe = SafeCheckpoints(takes_newest=True, found=found)
    ddp = DDPStrategy(find_unused_parameters=True)
    return train(folder, ddp, steps=STEPS + 1, safe=safe, ckpt_path=found)


def disagree(folder: Path) -> dict[str, Any]:
    found = folder / "step=2.ckpt" if os.environ["RANK"] == "0" else None
    safe = SafeCheckpoints(takes_newest=True, found=found)
    return train(folder, DDPStrategy(find_unused_parameters=True), safe=safe, ckpt_path=found)


def shards(folder: Path) -> dict[str, Any]:
    return train(folder, sharded(), save_last=True)


def full_disk_of_one(folder: Path) -> dict[str, Any]:
    """Of the process that is not the first, in the second of the saves."""
    original = FileSystem.create_stream

    def create(self: Any, path: Any, mode: str) -> Any:
        if os.environ["RANK"] == "1" and "step=2" in str(path) and "w" in mode:
            raise DISK_FULL
        return original(self, path, mode)

    FileSystem.create_stream = create  # type: ignore[method-assign, assignment]
    return train(folder, sharded(), save_top_k=1)


def kill_before_naming() -> None:
    """After all parts of the second checkpoint are written, and before it has its name."""
    original, whole = sharded_saves.mark_complete, list[Path]()

    def mark(folder: Path) -> None:
        original(folder)
        whole.append(folder)
        if len(whole) == 2:
            os.killpg(0, signal.SIGKILL)

    sharded_saves.mark_complete = mark


def killed(folder: Path) -> dict[str, Any]:
    kill_before_naming()
    return train(folder, sharded(), save_top_k=0, save_last=True)


def killed_in_file(folder: Path) -> dict[str, Any]:
    """When half of the second last.ckpt is written."""
    original = checkpoint_io._save_to

    def save(sink: Any, checkpoint: Any) -> None:
        original(sink, checkpoint)
        if checkpoint["global_step"] == 2:
            sink.file.truncate(sink.file.tell() // 2)
            os.killpg(0, signal.SIGKILL)

    checkpoint_io._save_to = save
    return train(folder, DDPStrategy(find_unused_parameters=True), save_top_k=0, save_last=True)


def restarted(folder: Path) -> dict[str, Any]:
    """As ``--ckpt_path last`` does it."""
    last = folder / "last.ckpt"
    safe = SafeCheckpoints(takes_newest=True, found=last)
    ddp = DDPStrategy(find_unused_parameters=True)
    return train(folder, ddp, safe=safe, ckpt_path=last, save_top_k=0, save_last=True)


def resume(folder: Path) -> dict[str, Any]:
    own = folder.parent / f"resumed_{os.environ['WORLD_SIZE']}"
    shutil.copytree(folder / "step=2.ckpt", own / "step=2.ckpt", dirs_exist_ok=True)
    return train(own, sharded(), ckpt_path=own / "step=2.ckpt", save_top_k=0, save_last=True)


def resume_unsharded(folder: Path) -> dict[str, Any]:
    own = folder.parent / "resumed_unsharded"
    shutil.copytree(folder / "step=2.ckpt", own / "step=2.ckpt", dirs_exist_ok=True)
    return train(own, "auto", ckpt_path=own / "step=2.ckpt", save_top_k=0, save_last=True)


RUNS: list[tuple[Callable[[Path], dict[str, Any]], str, int]] = [
    (full_disk, "full_disk", 2),
    (never, "never", 2),
    (no_link, "no_link", 2),
    (several, "several", 2),
    (newest, "several", 2),
    (disagree, "several", 2),
    (shards, "shards", 2),
    (full_disk_of_one, "full_disk_of_one", 2),
    (killed, "killed", 2),
    (killed_in_file, "killed_in_file", 2),
    (restarted, "killed_in_file", 2),
    (resume, "shards", 1),
    (resume, "shards", 4),
    (resume_unsharded, "shards", 1),
]


def worker(folder: Path, runs: Sequence[tuple[Callable[[Path], dict[str, Any]], str, int]]) -> None:
    for run, name, world_size in runs:
        if run is newest:  # the newest one is damaged
            path = folder / name / "step=3.ckpt"
            path.write_bytes(path.read_bytes()[:-2000])
        launch(run, folder / name, world_size)


def launch(run: Callable[[Path], dict[str, Any]], folder: Path, world_size: int) -> None:
    """Fork the processes of a job, in a group of their own; they end in time or are ended."""
    port, ranks = free_port(), list[int]()
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            os.setpgid(0, ranks[0] if ranks else 0)
            work(run, folder, rank, world_size, port)
        os.setpgid(child, ranks[0] if ranks else child)
        ranks.append(child)
    deadline, running = time.monotonic() + 60, set(ranks)
    while running and time.monotonic() < deadline:
        running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.02)
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not running, f"{run.__name__} hangs"


def work(run: Callable[[Path], dict[str, Any]], folder: Path, rank: int, world_size: int, port: int) -> None:
    """In a process of its own."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({**address, **{name: str(value) for name, value in place.items()}})
    try:
        torch.save(run(folder), folder.parent / f"{run.__name__}_{rank}_of_{world_size}.pt")
    except BaseException:
        traceback.print_exc()
    os._exit(0)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), RUNS)
