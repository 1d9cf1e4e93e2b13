"""What signals do in one process; several, and what a continued run is, are in tests/distributed/launching."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.preemption import INTERRUPTED, PREEMPTED, Preemption, requeue
from lightning_modules.checkpoint_io import BackgroundCheckpointIO, StreamingCheckpointIO


class At(Callback):
    """Does something at the start of a batch."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen.append(trainer.global_step)
        if trainer.global_step == self.step:
            self.act()


def send(*signals: signal.Signals, pause: float = 0.0) -> Callable[[], None]:
    def act() -> None:
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    return act


def fit(
    folder: Path,
    *callbacks: Callback,
    saver: ModelCheckpoint | None = None,
    ckpt_path: str | None = None,
    plugins: Any = None,
) -> pl.Trainer:
    saver = saver or ModelCheckpoint(folder, every_n_train_steps=100, save_top_k=0, save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=6, logger=False, default_root_dir=folder, callbacks=[*callbacks, saver],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, plugins=plugins,
    )  # fmt: skip
    trainer.fit(BoringModel(), ckpt_path=ckpt_path, weights_only=False)
    return trainer


def saved_step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, PREEMPTED), (signal.SIGUSR1, PREEMPTED), (signal.SIGINT, INTERRUPTED)],
)
def test_a_signal_ends_the_fit_at_the_end_of_the_step(number: signal.Signals, code: int, tmp_path: Path) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    at = At(2, send(number))
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, at, Preemption())
    assert stop.value.code == code
    assert at.seen == [0, 1, 2]
    assert saved_step(tmp_path / "last.ckpt") == 3
    assert {each: signal.getsignal(each) for each in before} == before


@pytest.mark.parametrize("fails", [False, True], ids=["well", "full disk"])
def test_a_checkpoint_that_is_written_in_the_background_is_waited_for(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM ends a job as soon as it is asked to requeue it."""

    def save_slowly(self: StreamingCheckpointIO, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        time.sleep(0.5)
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        torch.save({"global_step": checkpoint["global_step"]}, path)

    there: list[bool] = []
    monkeypatch.setattr(StreamingCheckpointIO, "save_checkpoint", save_slowly)
    told = "callbacks.preemption.rank_zero_info"
    monkeypatch.setattr(told, lambda _: there.append((tmp_path / "last.ckpt").exists()))
    warned = (
        pytest.warns(UserWarning, match="of this signal could not be saved: .*No space") if fails else nullcontext()
    )
    with pytest.raises(SystemExit) as stop, warned:
        fit(tmp_path, At(2, send(signal.SIGTERM)), Preemption(), plugins=BackgroundCheckpointIO())
    assert stop.value.code == PREEMPTED and there == [not fails]


def test_it_may_ask_less_often(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, At(2, send(signal.SIGTERM)), Preemption(every_n_steps=4))
    assert saved_step(tmp_path / "last.ckpt") == 4


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    assert fit(tmp_path, At(5, send(signal.SIGTERM)), Preemption()).global_step == 6


def test_what_is_not_heeded_keeps_its_handler(tmp_path: Path) -> None:
    before, found = signal.getsignal(signal.SIGTERM), []
    fit(tmp_path, At(1, lambda: found.append(signal.getsignal(signal.SIGTERM))), Preemption(signals=[]))
    assert found == [before]


def test_ctrl_c_that_the_terminal_and_the_launcher_both_send_is_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, At(1, send(signal.SIGINT, signal.SIGINT)), Preemption())
    assert stop.value.code == INTERRUPTED
    assert saved_step(tmp_path / "last.ckpt") == 2


def test_ctrl_c_again_stops_at_once(tmp_path: Path) -> None:
    at = At(1, send(signal.SIGINT, signal.SIGINT, pause=1.1))
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, at, Preemption())
    assert stop.value.code != INTERRUPTED  # Lightning's own way out
    assert not (tmp_path / "last.ckpt").exists()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which ignores it from then on


def test_a_checkpoint_of_the_step_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = pl.Trainer.save_checkpoint
    monkeypatch.setattr(
        pl.Trainer, "save_checkpoint", lambda self, path, *a, **k: (written.append(path), original(self, path, *a, **k))
    )
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=0, save_last=True)
    with pytest.raises(SystemExit):
        fit(tmp_path, At(2, send(signal.SIGTERM)), Preemption(), saver=saver)
    assert len(written) == 1


def test_where_last_is_a_link_it_points_to_the_new_file(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, save_last="link")
    with pytest.raises(SystemExit):
        fit(tmp_path, At(2, send(signal.SIGTERM)), Preemption(), saver=saver)
    assert (tmp_path / "last.ckpt").is_symlink()
    assert saved_step(tmp_path / "last.ckpt") == 3


def test_the_next_checkpoint_replaces_that_of_the_signal(tmp_path: Path) -> None:
    """Lightning would write last-v1.ckpt beside a file that it does not know."""
    with pytest.raises(SystemExit):
        fit(tmp_path, At(2, send(signal.SIGTERM)), Preemption())
    fit(tmp_path, Preemption(), ckpt_path="last")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert saved_step(tmp_path / "last.ckpt") == 6


def test_a_signal_before_the_first_step_leaves_nothing_new(tmp_path: Path) -> None:
    class Check(Callback):
        def on_validation_batch_start(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=6, logger=False, num_sanity_val_steps=1, enable_progress_bar=False,
        callbacks=[Check(), Preemption(), ModelCheckpoint(tmp_path, save_last=True)],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        trainer.fit(BoringModel())
    assert stop.value.code == PREEMPTED
    assert list(tmp_path.iterdir()) == []


def test_without_a_saver_the_user_is_told(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_top_k=0, save_last=False)
    with pytest.warns(UserWarning, match="save_last: true"), pytest.raises(SystemExit):
        fit(tmp_path, At(2, send(signal.SIGTERM)), Preemption(), saver=saver)


@pytest.mark.parametrize("options", [{"signals": ["SIGNOTHING"]}, {"every_n_steps": 0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="SIGNOTHING|every_n_steps"):
        Preemption(**options)


def test_a_job_of_an_array_is_requeued_by_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "called"}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    requeue()
    assert (tmp_path / "called").read_text() == "requeue 10_2\n"


def test_a_job_that_slurm_does_not_requeue_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="did not requeue job 12"):
        requeue()


@pytest.mark.parametrize("saves_nothing", [False, True])
def test_a_job_that_can_save_nothing_is_not_requeued_for_ever(
    saves_nothing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("callbacks.preemption.requeue", lambda: asked.append(True))
    trainer: Any = SimpleNamespace(
        global_step=3,
        loggers=[],
        is_global_zero=True,
        callbacks=[SimpleNamespace(saves_nothing=saves_nothing)],
        _accelerator_connector=SimpleNamespace(cluster_environment=SLURMEnvironment(auto_requeue=True)),
    )
    preemption, module = Preemption(), BoringModel()
    preemption._noted.agreed = signal.SIGUSR1
    warned = pytest.warns(UserWarning, match="not one checkpoint could be saved") if saves_nothing else nullcontext()
    with warned:
        preemption.on_exception(trainer, module, SIGTERMException())
    assert bool(asked) != saves_nothing


GROUP = """
import sys, time
import lightning.pytorch as pl, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from callbacks.preemption import Preemption
from datamodules.loading import map_loader

class Samples(torch.utils.data.Dataset):
    def __getitems__(self, keys):
        return torch.zeros(len(keys), 32)

class Slow(BoringModel):
    def training_step(self, batch, batch_idx):
        print("step", flush=True)
        time.sleep(0.3)
        return super().training_step(batch, batch_idx)

saver = ModelCheckpoint(sys.argv[1], every_n_train_steps=1000, save_top_k=0, save_last=True)
trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=40, logger=False, enable_progress_bar=False,
                     enable_model_summary=False, limit_val_batches=0, callbacks=[Preemption(), saver])
trainer.fit(Slow(), map_loader(Samples(), range(4000), batch_size=4, training=True, trainer=None, num_workers=2))
"""


def test_a_signal_to_the_whole_group_spares_the_processes_that_read(tmp_path: Path) -> None:
    """As launchers send it; a reading process that dies of it would end the run in the middle of its step."""
    command = [sys.executable, "-c", GROUP, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "step":
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == PREEMPTED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert saved_step(tmp_path / "last.ckpt") > 0
