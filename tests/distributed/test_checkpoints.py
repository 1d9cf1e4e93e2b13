"""Saving and loading by several processes together: what one finds, all do.

Run as a script, this file is the worker: ``FOLDER``. It imports everything once, and forks the processes of each run.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from callbacks.ema import EMA
from datamodules.digits import DigitsDataModule
from flexidit import create_model, load_checkpoint
from flexidit.checkpoint import save_checkpoint
from flexidit.cli import main
from flexidit.sharded_files import check_sharded
from flexidit.weight_files import load_pickle
from lightning_modules import ClassConditional, checkpoint_io, safe_checkpoints
from lightning_modules.checkpoint_files import UNFINISHED, recover
from lightning_modules.checkpoint_io import StreamingCheckpointIO
from lightning_modules.safe_checkpoints import SafeCheckpoints
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

pytestmark = pytest.mark.xdist_group("distributed")

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
    module = ClassConditional(
        TargetSettings(checkpoint=str(folder.parent / "target.safetensors")),
        FlexSettings([4]),
        optimizer=OptimizerSettings(lr=1e-2),
    )
    safe = safe or SafeCheckpoints()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_steps=steps,
        plugins=[StreamingCheckpointIO()],
        callbacks=[
            safe,
            record := Record(),
            EMA(0.8),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=1, **{"save_top_k": -1, **options}),
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
    said = [str(warning.message) for warning in caught if "could not be saved" in str(warning.message)]
    found = {"error": error, "warnings": said, "step": trainer.global_step, "path": str(trainer.ckpt_path)}
    return {**found, "losses": record.losses, "weights": record.weights}


def sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(int(os.environ["WORLD_SIZE"]), 1, save_distributed_checkpoint=True)


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


def killed(folder: Path) -> dict[str, Any]:
    """After all parts of the second checkpoint are written, and before it has its name."""
    original = safe_checkpoints.mark_complete
    saved: list[Path] = []

    def mark(path: Path) -> None:
        original(path)
        saved.append(path)
        if len(saved) == 2:
            os.killpg(0, signal.SIGKILL)

    safe_checkpoints.mark_complete = mark
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


def worker(folder: Path) -> None:
    for run, name, world_size in RUNS:
        if run is newest:  # the newest one is damaged
            path = folder / name / "step=3.ckpt"
            path.write_bytes(path.read_bytes()[:-2000])
        launch(run, folder / name, world_size)


def launch(run: Callable[[Path], dict[str, Any]], folder: Path, world_size: int) -> None:
    """Fork the processes of a job, in a group of their own; they end in time or are ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: list[int] = []
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = create_model("DiT-Tiny/2", **TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)  # a fresh model outputs zero
    save_checkpoint(model, folder / "target.safetensors")
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=600, env=alone
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (folder / "messages.txt").write_text(done.stderr)
    return folder


def results_of(folder: Path, name: str, world_size: int = 2) -> list[dict[str, Any]]:
    paths = [folder / f"{name}_{rank}_of_{world_size}.pt" for rank in range(world_size)]
    assert all(path.exists() for path in paths), (folder / "messages.txt").read_text()[-5000:]
    return [torch.load(path, weights_only=True) for path in paths]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_of_rank_0_is_a_warning_and_all_ranks_go_on(folder: Path) -> None:
    first, second = results_of(folder, "full_disk")
    assert first["step"] == second["step"] == STEPS
    assert first["error"] == second["error"] == ""
    assert len(first["warnings"]) == 1
    assert "step=2.ckpt could not be saved (No space left on device)" in first["warnings"][0]
    assert second["warnings"] == []
    assert names(folder / "full_disk") == ["step=3.ckpt"]


def test_a_job_that_could_not_save_once_ends_in_the_same_error_on_all_ranks(folder: Path) -> None:
    first, second = results_of(folder, "never")
    assert first["error"] == second["error"]
    assert f"not one of this run's {STEPS} checkpoints could be saved (No space left on device)" in first["error"]


def test_all_ranks_go_on_from_the_one_that_rank_0_chose(folder: Path) -> None:
    first, second = results_of(folder, "newest")
    assert first["path"] == second["path"] == str(folder / "several" / "step=2.ckpt")
    assert first["step"] == second["step"] == STEPS + 1
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


def test_ranks_of_which_some_see_no_checkpoint_end_in_one_sentence(folder: Path) -> None:
    first, second = results_of(folder, "disagree")
    assert first["error"] == second["error"]
    assert "some processes of this job see a checkpoint to go on from and others see none" in first["error"]


def test_a_sharded_checkpoint_is_a_whole_folder_and_its_model_can_be_had(folder: Path) -> None:
    last = folder / "shards" / "last.ckpt"
    check_sharded(last)
    assert names(last) == [".metadata", "__0_0.distcp", "__1_0.distcp", "complete.json", "meta.pt"]
    assert UNFINISHED not in names(folder / "shards")
    trained = results_of(folder, "shards")[0]["weights"]
    raw = load_checkpoint(last, prefer_ema=False).state_dict()
    for name, value in raw.items():
        assert torch.equal(value, trained[f"model.{name}"])
    average = load_pickle(last / "meta.pt")["callbacks"]["EMA"]["average"]
    for name, value in load_checkpoint(last).named_parameters():
        expected = average.get(f"model.{name}", raw[name])
        assert torch.equal(value, expected)
    assert not torch.equal(average["model.blocks.0.attn.qkv.weight"], raw["blocks.0.attn.qkv.weight"])


def test_a_sharded_checkpoint_becomes_one_file(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "one.safetensors"
    assert main(["convert", str(folder / "shards" / "last.ckpt"), str(output), "--to", "flexidit"]) == 0
    one, other = load_checkpoint(output).state_dict(), load_checkpoint(folder / "shards" / "last.ckpt").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "meta.pt"])
def test_a_sharded_checkpoint_that_lacks_a_file_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    copied = tmp_path / "last.ckpt"
    shutil.copytree(folder / "shards" / "last.ckpt", copied)
    (copied / name).unlink()
    for check in (check_sharded, load_checkpoint):
        with pytest.raises(ValueError, match=rf"last\.ckpt is not whole: it has no {name}"):
            check(copied)


def test_one_that_plain_lightning_wrote_is_checked_by_what_it_lists(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "last.ckpt"
    shutil.copytree(folder / "shards" / "last.ckpt", copied)
    (copied / "complete.json").unlink()
    check_sharded(copied)
    (copied / "__1_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is not whole: it has no __1_0\.distcp"):
        check_sharded(copied)


def test_a_flipped_bit_of_a_shard_is_noticed(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "last.ckpt"
    shutil.copytree(folder / "shards" / "last.ckpt", copied)
    shard = copied / "__1_0.distcp"
    weight = load_checkpoint(copied, prefer_ema=False).blocks[1].mlp.fc1.weight
    content = shard.read_bytes()
    position = content.index(weight.chunk(2)[1].detach().numpy().tobytes())  # the second process's rows
    shard.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    with pytest.raises(ValueError, match=r"__1_0\.distcp is damaged \(its part state_dict\.model\.blocks\.1\.mlp\.fc1"):
        load_checkpoint(copied)


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_a_sharded_checkpoint_with_code_in_it_is_refused(
    folder: Path, tmp_path: Path, hostile: Callable[..., Path], name: str
) -> None:
    copied = tmp_path / "last.ckpt"
    shutil.copytree(folder / "shards" / "last.ckpt", copied)
    (copied / "complete.json").unlink()
    hostile(copied / name, is_zip=name == "meta.pt")
    for check in (check_sharded, load_checkpoint):
        with pytest.raises(ValueError, match=f"{name} holds objects that only running its code could rebuild"):
            check(copied)
    assert not (copied / "was_run").exists()


def test_one_process_that_cannot_write_its_shard_costs_that_checkpoint_only(folder: Path) -> None:
    first, second = results_of(folder, "full_disk_of_one")
    assert first["step"] == second["step"] == STEPS
    assert len(first["warnings"]) == 1
    assert "step=2.ckpt could not be saved" in first["warnings"][0]
    assert names(folder / "full_disk_of_one") == ["step=3.ckpt"]
    check_sharded(folder / "full_disk_of_one" / "step=3.ckpt")


def test_a_kill_in_a_sharded_save_leaves_the_one_before(folder: Path) -> None:
    killed = folder / "killed"
    assert not (folder / "killed_0_of_2.pt").exists()
    check_sharded(killed / "last.ckpt")
    assert load_pickle(killed / "last.ckpt" / "meta.pt")["global_step"] == 1
    assert recover(killed) == ["last.ckpt"]
    assert names(killed) == ["last.ckpt"]


def test_after_a_kill_in_a_save_the_job_goes_on_and_nothing_of_it_is_left(folder: Path) -> None:
    assert not (folder / "killed_in_file_0_of_2.pt").exists()
    first, second = results_of(folder, "restarted")
    whole = results_of(folder, "several")
    assert first["step"] == second["step"] == STEPS
    for rank, other in zip((first, second), whole, strict=True):
        assert rank["losses"] == other["losses"][1:]  # the first step is in the checkpoint
    assert names(folder / "killed_in_file") == ["last.ckpt"]


@pytest.mark.parametrize("name, world_size", [("resume", 1), ("resume", 4), ("resume_unsharded", 1)])
def test_any_number_of_ranks_goes_on_from_a_sharded_checkpoint(folder: Path, name: str, world_size: int) -> None:
    resumed, whole = results_of(folder, name, world_size), results_of(folder, "shards")
    assert all(rank["error"] == "" and rank["step"] == STEPS for rank in resumed)
    loss = sum(rank["losses"][-1] for rank in resumed) / world_size
    assert loss == pytest.approx(sum(rank["losses"][-1] for rank in whole) / 2, rel=1e-4)
    own = "resumed_unsharded" if name == "resume_unsharded" else f"resumed_{world_size}"
    paths = (folder / own / "last.ckpt", folder / "shards" / "last.ckpt")
    ours, theirs = (load_checkpoint(path).state_dict() for path in paths)  # the average
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-3)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
