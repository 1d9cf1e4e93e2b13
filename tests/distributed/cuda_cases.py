"""Shards of one GPU that are written while it trains on: ``background_cases`` with NCCL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.distributed import background_cases
from tests.distributed.checkpoint_cases import worker


def at_once(folder: Path) -> dict[str, Any]:
    return background_cases.at_once(folder, "cuda")


def overtaken(folder: Path) -> dict[str, Any]:
    return background_cases.overtaken(folder, "cuda")


RUNS = [(at_once, "at_once", 1), (overtaken, "overtaken", 1)]


if __name__ == "__main__":
    worker(Path(sys.argv[1]), RUNS)
