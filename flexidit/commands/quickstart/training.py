"""The two trainings of the quick start: a plain target, then its flexible student. Each continues where it was."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.ema import EMA
from callbacks.step_progress import StepProgress
from datamodules.digits import DigitsDataModule
from flexidit.checkpoint import load_checkpoint, save_checkpoint
from flexidit.commands.quickstart.settings import QuickstartSettings
from lightning_modules.class_conditional import ClassConditional
from lightning_modules.pretraining import Pretraining
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings

if TYPE_CHECKING:
    from lightning_modules.base import DiffusionModule


def pretrain(settings: QuickstartSettings, out: Path) -> Path:
    """Train the target from random weights; returns its averaged weights' file."""
    target = out / "target.safetensors"
    if not target.is_file():
        pl.seed_everything(settings.seed, verbose=False)
        module = Pretraining(
            TargetSettings("DiT-Tiny/2", settings.variant_overrides()),
            optimizer=OptimizerSettings(settings.pretraining_lr, warmup_steps=100, decay="cosine"),
            seed=settings.seed,
        )
        last = _fit(module, settings, settings.pretraining_steps, out, "pre-training")
        save_checkpoint(load_checkpoint(last), target)
    return target


def fine_tune(settings: QuickstartSettings, out: Path, target: Path) -> Path:
    """Flexify the target and fine-tune the student; returns its averaged weights' file."""
    student = out / "student.safetensors"
    if not student.is_file():
        pl.seed_everything(settings.seed, verbose=False)
        module = ClassConditional(
            TargetSettings(checkpoint=str(target)),
            FlexSettings([settings.weak_patch_size]),
            MatchingSettings(
                weight=settings.mmd_weight,
                start_step=settings.mmd_start_step,
                every_n_steps=settings.mmd_every_n_steps,
                num_timesteps=settings.num_sampling_steps,
            ),
            OptimizerSettings(settings.fine_tuning_lr, warmup_steps=50, decay="cosine"),
            seed=settings.seed,
        )
        last = _fit(module, settings, settings.fine_tuning_steps, out, "fine-tuning")
        save_checkpoint(load_checkpoint(last), student)
    return student


def _fit(module: DiffusionModule, settings: QuickstartSettings, max_steps: int, out: Path, stage: str) -> Path:
    """Train, from the last checkpoint if there is one; returns the final checkpoint."""
    folder = out / "checkpoints" / stage
    last = folder / "last.ckpt"
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=max_steps,
            val_check_interval=250,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            log_every_n_steps=20,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=out,
            logger=TensorBoardLogger(out, name="tensorboard", version=stage),
            callbacks=[
                EMA(settings.ema_decay, warmup=True),
                ModelCheckpoint(folder, every_n_train_steps=250, save_top_k=1, save_last=True),
                StepProgress(f"{stage:<12}"),
            ],
        )
        data = DigitsDataModule(batch_size=settings.batch_size, seed=settings.seed)
        trainer.fit(module, data, ckpt_path=str(last) if last.is_file() else None)
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
