"""A fit of seconds for the command line, and what a fit leaves in the process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TARGET = {"input_size": 8, "in_channels": 1, "num_classes": 10, "depth": 1, "hidden_size": 32, "num_heads": 2}


def small_run(max_steps: int, *callbacks: dict[str, Any]) -> dict[str, Any]:
    """A config that flexifies a random model and fits it to digits."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_modules.ClassConditional",
            "init_args": {"target": {"variant": "DiT-Tiny/2", "overrides": TARGET}, "flex": {"patch_sizes": [4]}},
        },
        "data": {"class_path": "datamodules.digits.DigitsDataModule", "init_args": {"batch_size": 32}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": max_steps,
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "logger": False,
            "callbacks": [*callbacks],
        },
    }


@contextmanager
def kept_filters() -> Iterator[None]:
    """The command filters what Lightning logs, for the life of a process; in a test, until the block ends."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    filters = list(logger.filters)
    yield
    logger.filters[:] = filters
