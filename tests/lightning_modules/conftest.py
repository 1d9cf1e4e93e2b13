"""Small training runs: a tiny transformer on the real digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from datamodules.digits import DigitsDataModule
from lightning_modules.settings import TargetSettings

OVERRIDES = {"input_size": 8, "in_channels": 1, "num_classes": 10, "depth": 2, "hidden_size": 32, "num_heads": 2}


@pytest.fixture(scope="session")
def tiny() -> TargetSettings:
    return TargetSettings("DiT-Tiny/2", OVERRIDES)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Fit a module for some steps; returns the trainer."""

    def run(module: pl.LightningModule, max_steps: int = 3, batch_size: int = 16, **options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
        }
        trainer = pl.Trainer(
            max_steps=max_steps,
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            use_distributed_sampler=False,
            **{**defaults, **options},
        )
        trainer.fit(module, DigitsDataModule(batch_size=batch_size))
        return trainer

    return run
