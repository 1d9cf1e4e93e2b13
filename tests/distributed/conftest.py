"""Test files that are their own workers, run by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from flexidit import create_model
from flexidit.checkpoint import save_checkpoint
from tests.distributed.checkpoint_cases import TINY


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., None]:
    """Run a file in several processes of this machine until they are done: ``(file, folder, num_processes=2)``."""

    def run(file: str, folder: Path, num_processes: int = 2) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads than cores would wait for one another
        arguments = [*command, str(num_processes), file, str(folder)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=alone)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.fixture(scope="session")
def run_cases(randomised: Callable[..., nn.Module]) -> Callable[[str, Path], Path]:
    """Do the runs of a module of this folder, ``checkpoint_cases`` or alike, in a folder: ``(module, folder)``."""

    def run(module: str, folder: Path) -> Path:
        save_checkpoint(randomised(create_model("DiT-Tiny/2", **TINY)), folder / "target.safetensors")
        root, alone = Path(__file__).resolve().parents[2], {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", f"tests.distributed.{module}", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=alone, cwd=root)
        assert done.returncode == 0, done.stderr[-5000:]
        (folder / "messages.txt").write_text(done.stderr)
        return folder

    return run
