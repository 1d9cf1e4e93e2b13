"""``last.ckpt`` as a link: to what is there, whatever the disk does."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_modules import checkpoint_io
from lightning_modules.checkpoint_io import BackgroundCheckpointIO, StreamingCheckpointIO
from lightning_modules.safe_checkpoints import SafeCheckpoints

STEPS = 3
DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(folder: Path, writer: Any = StreamingCheckpointIO, **options: Any) -> ModelCheckpoint:
    """A save after each step."""
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last="link", **{"save_top_k": -1, **options})
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, logger=False, default_root_dir=folder, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, plugins=writer(), callbacks=[SafeCheckpoints(), saver],
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert trainer.global_step == STEPS
    return saver


def last(folder: Path) -> str:
    assert (folder / "last.ckpt").is_symlink()
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    return str((folder / "last.ckpt").readlink())


@pytest.mark.parametrize("writer", [StreamingCheckpointIO, BackgroundCheckpointIO])
def test_it_points_to_the_newest(tmp_path: Path, writer: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*could not be.*")
        run(tmp_path, writer)
    assert last(tmp_path) == f"step={STEPS}.ckpt"
    assert not list(tmp_path.glob(".*"))


def test_it_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    """Of shards, from when the run was sharded."""
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "shard").touch()
    run(tmp_path, enable_version_counter=False)
    assert last(tmp_path) == f"step={STEPS}.ckpt"


def test_a_checkpoint_that_could_not_be_saved_is_not_pointed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint_io._save_to

    def save(sink: Any, checkpoint: Any) -> None:
        if checkpoint["global_step"] == STEPS:
            raise DISK_FULL
        original(sink, checkpoint)

    monkeypatch.setattr(checkpoint_io, "_save_to", save)
    with pytest.warns(UserWarning, match=f"step={STEPS}.ckpt could not be saved"):
        run(tmp_path, save_top_k=1)
    assert last(tmp_path) == f"step={STEPS - 1}.ckpt"


def test_a_link_that_cannot_be_made_is_a_warning_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.symlink_to

    def refuse(self: Path, target: Any) -> None:
        if f"step={STEPS}" in str(target):
            raise DISK_FULL
        original(self, target)

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.warns(UserWarning, match=r"last\.ckpt could not be made to point to .*No space left on device"):
        run(tmp_path)
    assert last(tmp_path) == f"step={STEPS - 1}.ckpt"
    assert sorted(path.name for path in tmp_path.glob("step*")) == [f"step={step}.ckpt" for step in range(1, STEPS + 1)]
