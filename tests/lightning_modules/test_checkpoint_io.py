"""A checkpoint is whole or not there, and never twice in memory."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch

from lightning_modules.checkpoint_io import StreamingCheckpointIO


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "last.ckpt"
    StreamingCheckpointIO().save_checkpoint({"weight": torch.arange(3), "step": 7}, path)
    loaded = StreamingCheckpointIO().load_checkpoint(path)
    assert loaded["step"] == 7
    assert torch.equal(loaded["weight"], torch.arange(3))


def test_a_failed_save_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    StreamingCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        StreamingCheckpointIO().save_checkpoint({"weight": torch.zeros(1000), "code": (i for i in ())}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_saving_needs_no_second_copy_in_memory(tmp_path: Path) -> None:
    """200 MB; Lightning's own writer takes as much again."""
    code = (
        "import resource, sys, torch\n"
        "from lightning_modules.checkpoint_io import StreamingCheckpointIO\n"
        "weights = {'weight': torch.ones(50_000_000)}\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "StreamingCheckpointIO().save_checkpoint(weights, sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "last.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 50e6


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
def test_a_file_that_finds_no_room_is_an_error_with_its_reason_and_leaves_no_trace(tmp_path: Path) -> None:
    """torch's writer would say "unexpected pos"; a limit on the size of files stands for a disk that is full."""
    code = (
        "import resource, signal, sys, torch\n"
        "from lightning_modules.checkpoint_io import StreamingCheckpointIO\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "StreamingCheckpointIO().save_checkpoint({'step': 1}, sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    StreamingCheckpointIO().save_checkpoint({'weight': torch.ones(1_000_000)}, sys.argv[1])\n"
        "except OSError as error:\n"
        "    print(error.errno, error.filename)\n"
    )
    path = tmp_path / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), str(path)]
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_code_is_not_run_whatever_lightning_asks_for(tmp_path: Path, hostile: Callable[[Path], Path]) -> None:
    with pytest.raises(UnpicklingError):
        StreamingCheckpointIO().load_checkpoint(hostile(tmp_path / "hostile.ckpt"), weights_only=False)
    assert not (tmp_path / "was_run").exists()
