"""A save that fails costs a warning, and no older checkpoint; Lightning's own callback decides what is kept."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flexidit.weight_files import load_pickle
from lightning_modules import checkpoint_io
from lightning_modules.checkpoint_files import begin
from lightning_modules.checkpoint_io import BackgroundCheckpointIO, StreamingCheckpointIO
from lightning_modules.safe_checkpoints import SafeCheckpoints, forget

STEPS = 6


class Line(pl.LightningModule):
    """Logs the score that the test has for each step."""

    def __init__(self, scores: list[float] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.scores = scores or [0.0] * STEPS

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("score", self.scores[self.global_step])
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def run(folder: Path, writer: Any = None, scores: list[float] | None = None, **options: Any) -> pl.Trainer:
    ckpt_path, safe = options.pop("ckpt_path", None), options.pop("safe", None) or SafeCheckpoints()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=options.pop("max_steps", STEPS),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=[writer or StreamingCheckpointIO()],
        callbacks=[safe, ModelCheckpoint(folder, "{step}", **options)],
    )
    trainer.fit(Line(scores), DataLoader(TensorDataset(torch.ones(STEPS, 1))), ckpt_path=ckpt_path)
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[str]], None]:
    """Have saves of some files find the disk full, after some bytes."""

    def use(failing: set[str]) -> None:
        original = checkpoint_io._save_to

        def save(sink: Any, checkpoint: Any) -> None:
            sink.write(b"PK half a file")
            if Path(sink.file.name).name in failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sink.file.seek(0)
            original(sink, checkpoint)

        monkeypatch.setattr(checkpoint_io, "_save_to", save)

    return use


WRITERS = pytest.mark.parametrize("writer", [StreamingCheckpointIO, BackgroundCheckpointIO])


@WRITERS
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"every_n_train_steps": 2, "save_top_k": 1}, ["step=6.ckpt"]),
        ({"every_n_train_steps": 2, "save_top_k": -1}, ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]),
        ({"every_n_train_steps": 1, "save_top_k": 2, "monitor": "score"}, ["step=2.ckpt", "step=5.ckpt"]),
        ({"train_time_interval": timedelta(0), "save_top_k": 1, "save_last": True}, ["last.ckpt", "step=6.ckpt"]),
        ({"every_n_train_steps": 3, "save_top_k": 1, "save_last": "link"}, ["last.ckpt", "step=6.ckpt"]),
    ],
    ids=["newest", "all", "best", "time", "link"],
)
def test_lightning_decides_what_is_kept(
    tmp_path: Path, writer: Callable[[], Any], options: dict[str, Any], expected: list[str]
) -> None:
    run(tmp_path, writer(), scores=[5, 1, 4, 3, 2, 6], **options)
    assert names(tmp_path) == expected
    assert all(load_pickle(path)["global_step"] for path in tmp_path.iterdir())


@WRITERS
def test_a_full_disk_is_a_warning_and_the_older_checkpoint_stays_until_a_save_succeeds(
    tmp_path: Path, writer: Callable[[], Any], full_at: Callable[[set[str]], None]
) -> None:
    full_at({"step=4.ckpt", "step=6.ckpt"})
    with pytest.warns(UserWarning, match=r"step=4\.ckpt could not be saved \(No space left on device\): training goes"):
        trainer = run(tmp_path, writer(), every_n_train_steps=2, save_top_k=1)
    assert trainer.global_step == STEPS
    assert names(tmp_path) == ["step=2.ckpt"]


@WRITERS
def test_once_there_is_room_again_what_was_spared_goes(
    tmp_path: Path, writer: Callable[[], Any], full_at: Callable[[set[str]], None]
) -> None:
    full_at({"step=4.ckpt"})
    with pytest.warns(UserWarning, match="could not be saved"):
        run(tmp_path, writer(), every_n_train_steps=2, save_top_k=1)
    assert names(tmp_path) == ["step=6.ckpt"]


def test_a_file_that_was_never_written_is_not_the_best_one(tmp_path: Path, full_at: Callable[[set[str]], None]) -> None:
    """Otherwise nothing that comes later would be saved, being worse."""
    full_at({"step=2.ckpt"})
    with pytest.warns(UserWarning, match="could not be saved"):
        trainer = run(tmp_path, scores=[5, 1, 6, 3, 4, 6], every_n_train_steps=1, save_top_k=1, monitor="score")
    assert names(tmp_path) == ["step=4.ckpt"]
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "step=4.ckpt")
    assert trainer.checkpoint_callback.best_model_score == 3


def test_a_resumed_run_does_not_look_for_a_file_that_was_never_written(
    tmp_path: Path, full_at: Callable[[set[str]], None]
) -> None:
    """last.ckpt is saved after the best one in the same step, and holds the name of a file that is not there."""
    full_at({"step=2.ckpt"})
    options = {"every_n_train_steps": 1, "save_top_k": 1, "monitor": "score", "save_last": True}
    with pytest.warns(UserWarning, match="could not be saved"):
        run(tmp_path, scores=[5, 1, 6, 3, 4, 6], max_steps=2, **options)
    saved = next(iter(load_pickle(tmp_path / "last.ckpt")["callbacks"].values()))
    assert saved["best_model_path"].endswith("step=2.ckpt")
    trainer = run(tmp_path, scores=[5, 1, 6, 3, 4, 6], ckpt_path=tmp_path / "last.ckpt", **options)
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "step=4.ckpt")


@WRITERS
def test_a_run_that_could_not_save_once_ends_in_an_error(tmp_path: Path, writer: Callable[[], Any]) -> None:
    """Its folder is a file: nobody can write there, root neither."""
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be saved"), pytest.raises(OSError, match="not one of this run's 3"):
        run(tmp_path / "file", writer(), every_n_train_steps=2, save_top_k=1)
    assert (tmp_path / "file").read_text() == "in the way"


def test_without_trouble_there_is_no_warning_and_without_saves_no_error(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*saved.*")
        run(tmp_path, every_n_train_steps=2, save_top_k=1, save_last=True)
        run(tmp_path / "other", every_n_train_steps=2 * STEPS)
    assert names(tmp_path) == ["last.ckpt", "step=6.ckpt"]


def test_what_a_killed_job_left_is_gone_at_the_next_start(tmp_path: Path) -> None:
    begin(tmp_path / "last.ckpt").write_bytes(b"half")
    (tmp_path / ".last.ckpt.tmp").write_bytes(b"of somebody else")
    run(tmp_path, every_n_train_steps=STEPS, save_top_k=1)
    assert names(tmp_path) == [".last.ckpt.tmp", "step=6.ckpt"]


def test_a_damaged_checkpoint_is_refused_with_the_newest_good_one_or_that_is_taken(
    tmp_path: Path, flip_a_bit: Callable[[Path], Path]
) -> None:
    run(tmp_path, every_n_train_steps=2, save_top_k=-1)
    damaged, good = flip_a_bit(tmp_path / "step=6.ckpt"), tmp_path / "step=4.ckpt"
    told = rf"step=6\.ckpt is damaged .* the newest good one before it is {good}: give that to --ckpt_path"
    with pytest.raises(ValueError, match=told):
        run(tmp_path, ckpt_path=damaged, max_steps=8)
    safe = SafeCheckpoints(takes_newest=True, found=damaged)
    with pytest.warns(UserWarning, match=rf"step=6\.ckpt is damaged .* going on from {good}"):
        trainer = run(tmp_path, ckpt_path=damaged, max_steps=5, safe=safe)
    assert trainer.ckpt_path == str(good)
    assert trainer.global_step == 5


def test_weights_without_an_optimizer_are_passed_over(tmp_path: Path) -> None:
    run(tmp_path, every_n_train_steps=3, save_top_k=-1)
    run(tmp_path / "weights", every_n_train_steps=3, save_top_k=1, save_weights_only=True)
    weights = tmp_path / "step=9.ckpt"
    (tmp_path / "weights" / "step=6.ckpt").rename(weights)
    safe = SafeCheckpoints(takes_newest=True, found=weights)
    with pytest.warns(UserWarning, match=r"step=9\.ckpt holds weights only, .* going on from .*step=6\.ckpt"):
        run(tmp_path, ckpt_path=weights, safe=safe)


def test_what_is_forgotten_is_no_longer_tracked() -> None:
    callback = ModelCheckpoint(monitor="score", save_top_k=3, mode="max")
    callback.best_k_models = {"a": torch.tensor(1.0), "b": torch.tensor(3.0), "c": torch.tensor(2.0)}
    callback.best_model_path, callback.last_model_path = "b", "b"
    forget(callback, {"b"})
    assert callback.best_model_path == "c"
    assert callback.best_model_score == 2
    assert set(callback.best_k_models) == {"a", "c"}
    assert callback.last_model_path == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_it_knows_that_not_one_save_has_succeeded(tmp_path: Path, full_at: Callable[[set[str]], None]) -> None:
    safe = SafeCheckpoints()
    assert not safe.saves_nothing
    full_at({f"step={step}.ckpt" for step in range(STEPS + 1)})
    with pytest.raises(OSError, match="not one of this run's"), pytest.warns(UserWarning, match="could not be saved"):
        run(tmp_path, safe=safe, every_n_train_steps=2, save_top_k=-1)
    assert safe.saves_nothing
