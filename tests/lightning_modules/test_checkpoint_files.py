"""At any moment a checkpoint is the old one or the new one; what a killed job leaves is put right."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import torch

from flexidit.weight_files import load_pickle
from lightning_modules import checkpoint_files
from lightning_modules.checkpoint_files import UNFINISHED, abandon, begin, candidates, place, recover
from lightning_modules.checkpoint_io import StreamingCheckpointIO


class Killed(BaseException):
    """Ends everything at once, as far as a test can."""


@contextmanager
def killed_before(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop before the n-th change to the file system."""
    left = [call]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **options)

        return run

    with monkeypatch.context() as patch:
        for owner, names in ((Path, ("rename", "replace", "mkdir", "rmdir")), (checkpoint_files, ("delete",))):
            for name in names:
                patch.setattr(owner, name, counted(getattr(owner, name)))
        yield


def write(path: Path, kind: str, content: str) -> None:
    """A file, or a folder of two."""
    temporary = begin(path)
    if kind == "folder":
        temporary.mkdir()
        (temporary / "one").write_text(content)
        (temporary / "two").write_text(content)
    else:
        temporary.write_text(content)


def read(path: Path) -> str:
    texts = {file.read_text() for file in path.iterdir()} if path.is_dir() else {path.read_text()}
    assert len(texts) == 1  # not of one and of the other
    return texts.pop()


@pytest.mark.parametrize("old", ["file", "folder", "nothing"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_it_is_the_old_or_the_new_one_wherever_placing_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    outcomes, is_done, call = set(), False, 0
    while not is_done:
        folder = tmp_path / str(call)
        path = folder / "last.ckpt"
        if old != "nothing":
            write(path, old, "old")
            place(path)
        write(path, new, "new")
        try:
            with killed_before(call, monkeypatch):
                place(path)
            is_done = True
        except Killed:
            assert old == "nothing" or candidates([folder]) == [path]
            recover(folder)
        outcomes.add(read(path) if path.exists() else "nothing")
        assert list(folder.iterdir()) in ([path], [])
        call += 1
    assert call > 1
    assert outcomes == {old if old == "nothing" else "old", "new"}


def test_what_is_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    others = ["last.ckpt", ".last.ckpt.tmp", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    write(tmp_path / "last.ckpt", "file", "half")
    write(tmp_path / "step=3.ckpt", "folder", "half")
    assert recover(tmp_path) == ["last.ckpt", "step=3.ckpt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    assert recover(tmp_path) == []


def test_what_is_given_up_leaves_no_trace(tmp_path: Path) -> None:
    write(tmp_path / "last.ckpt", "folder", "half")
    abandon(tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_no_unfinished_file_looks_like_one_of_lightning(tmp_path: Path) -> None:
    """It takes any name with hpc_ckpt_ in it for a checkpoint to resume from."""
    write(tmp_path / "hpc_ckpt_3.ckpt", "file", "half")
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED]


def test_checkpoints_are_found_newest_first(tmp_path: Path) -> None:
    for number, name in enumerate(["step=2.ckpt", "step=1.ckpt", "step=3.ckpt", "last.ckpt"]):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (0, min(number, 2)))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "gone.ckpt").symlink_to(tmp_path / "nowhere")
    found = [path.name for path in candidates([tmp_path, tmp_path / "missing"])]
    assert found == ["last.ckpt", "step=3.ckpt", "step=1.ckpt", "step=2.ckpt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_last_survives_kills_at_random_moments_of_saving(tmp_path: Path) -> None:
    path, random, step = tmp_path / "last.ckpt", Random(0), 0
    kills_while_writing = 0
    for _ in range(15):
        child = os.fork()
        if child == 0:
            save_for_ever(path, step + 1)
        time.sleep(random.uniform(0.05, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills_while_writing += bool(recover(tmp_path))
        if path.exists():
            found = load_pickle(path)  # every byte is compared
            assert torch.equal(found["weight"], torch.full((500_000,), float(found["step"])))
            assert found["step"] >= step
            step = found["step"]
        assert list(tmp_path.iterdir()) in ([path], [])
    assert step > 0
    assert kills_while_writing > 0


def save_for_ever(path: Path, step: int) -> None:
    """In a process of its own."""
    while True:
        StreamingCheckpointIO().save_checkpoint({"step": step, "weight": torch.full((500_000,), float(step))}, path)
        step += 1
