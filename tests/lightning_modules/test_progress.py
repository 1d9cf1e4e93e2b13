"""A checkpoint of any moment between two micro-batches is resumed exactly, and so is the resume of a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.ema import EMA
from datamodules.digits import DigitsDataModule
from lightning_modules import ClassConditional
from lightning_modules.progress import begun_batches
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

Fit = Callable[..., pl.Trainer]
BATCHES = 6  # of an epoch


class Recording(Callback):
    """Losses by (step, micro-batch), with a draw from a global generator in each, and a checkpoint after each."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.step = folder, 0
        self.seen: list[tuple[int, int, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *args: Any) -> None:
        self.step = trainer.global_step
        batch["x"] += 0.1 * torch.randn(())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append((self.step, batch_idx, outputs["loss"].item()))
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{len(self.seen)}.ckpt")


@pytest.fixture
def run(fit: Fit, tiny: TargetSettings) -> Callable[..., tuple[Recording, pl.Trainer]]:
    def run(accumulate: int, folder: Path | None = None, **options: Any) -> tuple[Recording, pl.Trainer]:
        torch.manual_seed(0)
        module = ClassConditional(tiny, FlexSettings([4]), optimizer=OptimizerSettings(1e-2))
        data = DigitsDataModule(batch_size=8, val_fraction=0.97)
        limit = {"max_steps": -1, "max_epochs": 3, **options}
        trainer = fit(
            module, data=data, callbacks=[EMA(0.5), recording := Recording(folder)], accumulate_grad_batches=accumulate,
            limit_val_batches=1, val_check_interval=4, check_val_every_n_epoch=None, **limit,
        )  # fmt: skip
        return recording, trainer

    return run


def begin_of_step(accumulate: int, saved_after: int) -> int:
    """Micro-batches that a resume has not to repeat, of the run's first ``saved_after``."""
    epochs, rest = divmod(saved_after, BATCHES)
    return epochs * BATCHES + rest // accumulate * accumulate


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3, 4])  # with 4, an epoch ends with a step of 2
def test_a_resume_repeats_a_begun_step_from_its_beginning(run: Any, tmp_path: Path, accumulate: int) -> None:
    whole, trainer = run(accumulate, tmp_path)
    weights = [p.detach().clone() for p in trainer.lightning_module.parameters()]
    assert len(whole.seen) == 3 * BATCHES
    for saved_after in range(1, BATCHES + 4):
        resumed, trainer = run(accumulate, ckpt_path=tmp_path / f"{saved_after}.ckpt")
        assert resumed.seen == whole.seen[begin_of_step(accumulate, saved_after) :], saved_after
        pairs = zip(weights, trainer.lightning_module.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("first", [BATCHES - 1, BATCHES, BATCHES + 1])
def test_resumes_of_resumes_end_where_the_whole_run_ends(run: Any, tmp_path: Path, accumulate: int, first: int) -> None:
    """Also where all of them begin at the end of an epoch: the number of epochs is what ends the run."""
    whole, _ = run(accumulate, tmp_path)
    (tmp_path / "again").mkdir()
    run(accumulate, tmp_path / "again", ckpt_path=tmp_path / f"{first}.ckpt")
    done = begin_of_step(accumulate, first)
    for more in (2, BATCHES - 1, BATCHES, BATCHES + 1):
        resumed, trainer = run(accumulate, ckpt_path=tmp_path / "again" / f"{more}.ckpt")
        assert resumed.seen == whole.seen[begin_of_step(accumulate, done + more) :], more
        assert trainer.current_epoch == 3


def test_batches_of_a_begun_step() -> None:
    progress = {"is_last_batch": False, "current": {"ready": 5}}
    assert [begun_batches(progress, accumulated) for accumulated in (1, 2, 5)] == [0, 1, 0]
    assert begun_batches({**progress, "is_last_batch": True}, 2) == 0
