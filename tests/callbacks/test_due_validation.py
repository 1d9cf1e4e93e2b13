"""A checkpoint from the end of a step, and the validation that was to follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.preemption import Preemption


class Watch(Callback):
    """Steps, and validations with the number of their batches; may die before one."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.events: list[tuple[str, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.events.append(("step", trainer.global_step))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.dies_at:
            raise RuntimeError("killed")

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.events.append(("validation", trainer.global_step))


def fit(folder: Path, watch: Watch, ckpt_path: str | None = None, **options: Any) -> int:
    """Returns what Lightning calls the step when it logs."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=6, logger=False, limit_train_batches=4, limit_val_batches=2,
        check_val_every_n_epoch=None, val_check_interval=2, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[watch, Preemption(), ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=0, save_last=True)],
        **options,
    )  # fmt: skip
    trainer.fit(BoringModel(), ckpt_path=ckpt_path, weights_only=False)
    return trainer.fit_loop.epoch_loop._batches_that_stepped


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [2, 4])  # in an epoch of 4 batches, and at its end
def test_it_is_caught_up_on(step: int, accumulate: int, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": accumulate}
    whole, killed, continued = Watch(), Watch(dies_at=step), Watch()
    logged = fit(tmp_path / "whole", whole, **options)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "run", killed, **options)
    assert fit(tmp_path / "run", continued, ckpt_path="last", **options) == logged
    assert killed.events + continued.events == whole.events
    assert continued.events[:2] == [("validation", step)] * 2
