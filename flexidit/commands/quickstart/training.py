"""The trainings of the quick start: a plain target, then its flexible student. Each continues where it was."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.ema import EMA
from callbacks.step_progress import StepProgress
from flexidit.checkpoint import load_checkpoint, recorded_text, save_checkpoint
from lightning_modules.checkpoint_io import StreamingCheckpointIO

if TYPE_CHECKING:
    from flexidit.commands.quickstart.recipe import Recipe, Stage


def train(recipe: Recipe[Any], out: Path) -> None:
    """All stages, each from the averaged weights of the one before; what is there already is not trained again."""
    before = None
    for stage in recipe.stages():
        result = out / f"{stage.result}.safetensors"
        if not result.is_file():
            pl.seed_everything(recipe.settings.seed, verbose=False)
            last = _fit(recipe, stage, before, out)
            save_checkpoint(load_checkpoint(last), result, text=recorded_text(last))
        before = result


def _fit(recipe: Recipe[Any], stage: Stage, before: Path | None, out: Path) -> Path:
    """Train, from the last checkpoint if there is one; returns the final checkpoint."""
    folder = out / "checkpoints" / stage.name
    last = folder / "last.ckpt"
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=stage.num_steps,
            val_check_interval=250,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            log_every_n_steps=20,
            enable_model_summary=False,
            use_distributed_sampler=False,
            plugins=[StreamingCheckpointIO()],
            default_root_dir=out,
            logger=TensorBoardLogger(out, name="tensorboard", version=stage.name),
            callbacks=[
                EMA(recipe.settings.ema_decay, warmup=True),
                ModelCheckpoint(folder, every_n_train_steps=250, save_top_k=1, save_last=True),
                StepProgress(f"{stage.name:<12}"),
            ],
        )
        trainer.fit(stage.make(before), stage.data(), ckpt_path=str(last) if last.is_file() else None)
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.save_checkpoint(last)
    return last


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice, which is for people who train on accelerators."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
