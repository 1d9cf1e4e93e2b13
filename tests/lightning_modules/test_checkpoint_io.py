"""A checkpoint is whole or not there, and never twice in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
