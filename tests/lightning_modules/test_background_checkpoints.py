"""What is written while training goes on is what training had when it was asked to."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flexidit.weight_files import load_pickle
from lightning_modules import checkpoint_io
from lightning_modules.checkpoint_io import BackgroundCheckpointIO, StreamingCheckpointIO
from lightning_modules.snapshots import Snapshots


def state(value: float) -> dict[str, Any]:
    weight = torch.full((50_000,), value)
    return {"state_dict": {"weight": weight, "tied": weight}, "loops": {"steps": [value]}, "moments": (weight + 1,)}


def slow(monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...] = ()) -> None:
    """Writing takes a while; some of the saves, by number, find the disk full."""
    original, count = checkpoint_io._save_to, [0]

    def save(sink: Any, checkpoint: Any) -> None:
        time.sleep(0.1)
        count[0] += 1
        if count[0] in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(sink, checkpoint)

    monkeypatch.setattr(checkpoint_io, "_save_to", save)


def test_the_file_is_that_of_a_save_at_once_though_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StreamingCheckpointIO().save_checkpoint(state(1.0), tmp_path / "sync.ckpt")
    slow(monkeypatch)
    trained, writer = state(1.0), BackgroundCheckpointIO()
    started = time.perf_counter()
    writer.save_checkpoint(trained, tmp_path / "async.ckpt")
    assert time.perf_counter() - started < 0.1
    trained["state_dict"]["weight"].add_(1)
    trained["moments"][0].zero_()
    trained["loops"]["steps"].append(2.0)
    assert not (tmp_path / "async.ckpt").exists()
    writer.wait()
    sync, background = (load_pickle(tmp_path / f"{name}.ckpt") for name in ("sync", "async"))
    assert torch.equal(sync["state_dict"]["weight"], background["state_dict"]["weight"])
    assert torch.equal(sync["moments"][0], background["moments"][0])
    assert sync["loops"] == background["loops"]
    assert (tmp_path / "sync.ckpt").stat().st_size == (tmp_path / "async.ckpt").stat().st_size


def test_a_snapshot_shares_nothing_and_keeps_what_is_shared_inside() -> None:
    values = state(1.0)
    copied = Snapshots().take(values)
    assert copied["state_dict"]["weight"] is copied["state_dict"]["tied"]
    assert copied["state_dict"]["weight"].data_ptr() != values["state_dict"]["weight"].data_ptr()
    module = torch.nn.Linear(2, 2).state_dict()
    assert Snapshots().take(module)._metadata == module._metadata


def test_snapshots_use_memory_again_where_states_are_alike() -> None:
    snapshots = Snapshots()
    first = snapshots.take(state(1.0))["moments"][0]
    second = snapshots.take(state(2.0))["moments"][0]
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second, torch.full((50_000,), 3.0))
    other = snapshots.take([torch.zeros(2), torch.ones(3, dtype=torch.bfloat16), torch.tensor(4)])
    assert torch.equal(other[1], torch.ones(3, dtype=torch.bfloat16))
    assert other[2] == 4


def test_the_old_one_is_removed_after_the_new_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BackgroundCheckpointIO()
    writer.save_checkpoint(state(1.0), tmp_path / "1.ckpt")
    writer.wait()
    slow(monkeypatch)
    writer.save_checkpoint(state(2.0), tmp_path / "2.ckpt")
    writer.remove_checkpoint(tmp_path / "1.ckpt")  # as ModelCheckpoint does, at once
    assert (tmp_path / "1.ckpt").exists()
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["2.ckpt"]


def test_after_an_error_old_ones_stay_until_a_save_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, failing=(2,))
    writer = BackgroundCheckpointIO()
    writer.save_checkpoint(state(1.0), tmp_path / "1.ckpt")
    writer.save_checkpoint(state(2.0), tmp_path / "2.ckpt")
    writer.remove_checkpoint(tmp_path / "1.ckpt")
    with pytest.raises(OSError, match="No space left") as raised:
        writer.wait()
    assert raised.value.filename == str(tmp_path / "2.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["1.ckpt"]
    writer.save_checkpoint(state(3.0), tmp_path / "3.ckpt")
    writer.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["3.ckpt"]


def test_a_checkpoint_of_slurm_s_signal_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    writer = BackgroundCheckpointIO()
    writer.save_checkpoint(state(1.0), tmp_path / "hpc_ckpt_1.ckpt")
    assert torch.equal(writer.load_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")["moments"][0], state(1.0)["moments"][0])
    writer.teardown()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_it_is_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StreamingCheckpointIO().save_checkpoint(state(1.0), tmp_path / "1.ckpt")
    child = os.fork()
    if child == 0:
        slow(monkeypatch)
        writer = BackgroundCheckpointIO()
        writer.save_checkpoint(state(2.0), tmp_path / "2.ckpt")
        writer.remove_checkpoint(tmp_path / "1.ckpt")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert load_pickle(tmp_path / "1.ckpt")["loops"] == {"steps": [1.0]}
    assert not (tmp_path / "2.ckpt").exists()
