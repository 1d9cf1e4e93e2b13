"""What callbacks that sample have in common: averaged weights, precision, and where pictures go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from callbacks.breaking_off import Pace
from callbacks.ema import EMA
from callbacks.preemption import Preemption


def model_of(pl_module: LightningModule) -> Any:
    """The model that is trained, ``pl_module.model``."""
    model = getattr(pl_module, "model", None)
    if model is None:
        raise ValueError(f"{type(pl_module).__name__} has no attribute 'model' to sample from")
    return model


def codec_of(pl_module: LightningModule) -> Any:
    """What turns its samples into pixels, ``pl_module.codec``."""
    codec = getattr(pl_module, "codec", None)
    if codec is None:
        raise ValueError(f"{type(pl_module).__name__} has no attribute 'codec'; use PixelCodec for models of pixels")
    return codec


@contextmanager
def sampling(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """A block that samples with the EMA weights, if there are any, and leaves the global random state as it found it.

    Training must go on as if nobody had looked: a run that is resumed did not sample again.

    In a fit a signal breaks it off, at its beginning or before a call of the model: all ranks must make as many.

    Raises:
        BrokenOffError: on all ranks at the same place.
    """
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    average = next((callback for callback in callbacks if isinstance(callback, EMA)), EMA())
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    with (
        _heeding_signals(trainer, model_of(pl_module)),
        average.swapped(pl_module),
        torch.random.fork_rng(devices),
        torch.no_grad(),
    ):
        yield


@contextmanager
def _heeding_signals(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    preemption = Preemption.of(trainer)
    if preemption is None:
        yield
        return
    preemption.heed(trainer, pace := Pace())
    # Before what sharding does in a call, which would not be undone.
    hook = model.register_forward_pre_hook(lambda *_: preemption.heed(trainer, pace), prepend=True)
    try:
        yield
    finally:
        hook.remove()


def autocast_dtype(trainer: Trainer) -> torch.dtype | None:
    """Type that mixed precision runs the model in; None in true precision.

    For the sampler only. The trainer's own context would also cover the decoder and the feature network, whose
    float32 features the reference statistics are made of.
    """
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision))


def tensorboards(trainer: Trainer) -> list[Any]:
    """TensorBoard writers of the trainer's loggers; none off rank 0, where loggers are dummies."""
    if not trainer.is_global_zero:
        return []
    writers = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [writer for writer in writers if hasattr(writer, "add_figure") and hasattr(writer, "add_image")]


def log_directory(trainer: Trainer) -> Path:
    """Folder of this run. Every rank must ask: the trainer broadcasts it."""
    return Path(trainer.log_dir or trainer.default_root_dir)
