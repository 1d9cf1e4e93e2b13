"""Test files that are their own workers, run by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


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
