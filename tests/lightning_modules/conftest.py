"""Small training runs: tiny transformers of labels and of captions on the real digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from datamodules.captioned_digits import CaptionedDigitsDataModule
from datamodules.digits import DigitsDataModule
from flexidit import create_model
from flexidit.checkpoint import save_checkpoint
from lightning_modules.settings import TargetSettings

SIZES = {"input_size": 8, "in_channels": 1, "depth": 2, "hidden_size": 32, "num_heads": 2}
OVERRIDES = {**SIZES, "num_classes": 10}


@pytest.fixture(scope="session")
def tiny() -> TargetSettings:
    return TargetSettings("DiT-Tiny/2", OVERRIDES)


@pytest.fixture(scope="session")
def tiny_text() -> TargetSettings:
    return TargetSettings("TextDiT-Tiny/2", SIZES)


@pytest.fixture
def make_target(tmp_path: Path, randomised: Callable[..., nn.Module]) -> Callable[..., TargetSettings]:
    """Weights of a model that predicts something: a fresh one outputs zero, and stops most gradients."""

    def make(variant: str = "TextDiT-Tiny/2", name: str = "target", seed: int = 0, **overrides: Any) -> TargetSettings:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the null caption is drawn, and does not train
            model = randomised(create_model(variant, **{**SIZES, **overrides}), seed=seed)
        return TargetSettings(checkpoint=str(save_checkpoint(model, tmp_path / f"{name}.safetensors")))

    return make


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Fit a module for some steps, to digits with labels or with captions; returns the trainer."""

    def run(
        module: pl.LightningModule,
        max_steps: int = 3,
        batch_size: int = 16,
        data: pl.LightningDataModule | None = None,
        ckpt_path: Path | None = None,
        has_captions: bool = False,
        **options: Any,
    ) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
        }
        trainer = pl.Trainer(
            max_steps=max_steps,
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            use_distributed_sampler=False,
            **{**defaults, **options},
        )
        kind = CaptionedDigitsDataModule if has_captions else DigitsDataModule
        trainer.fit(module, data or kind(batch_size=batch_size), ckpt_path=ckpt_path)
        return trainer

    return run
