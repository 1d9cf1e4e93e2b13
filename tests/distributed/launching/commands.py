"""What a forked process does that is to be a command of its own."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from flexidit.cli import main


def run(argv: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    """Be ``flexidit argv`` in a folder; does not return."""
    os.environ.update({**environment, "CUDA_VISIBLE_DEVICES": ""})
    os.chdir(folder)
    sys.path.insert(0, str(Path(__file__).parent))  # where the tests' own callback is
    sys.argv = ["flexidit"]
    os._exit(_exit_code(argv))


def _exit_code(argv: list[str]) -> int:
    """What Python would exit with."""
    try:
        return main(argv)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
