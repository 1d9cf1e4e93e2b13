"""Records the loss of every batch of every rank, and does to a rank at a given moment what the test asks for."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

from flexidit.sampling.sampler import Sampler


class Probe(Callback):
    """Appends to ``losses_rank0.txt``: step, loss to the last bit. Says where weights are. Acts on ``$FAULT``.

    That is JSON: ``when`` ("train", "validation" or "sampling"), ``step``, ``batch`` (of the step, of the validation,
    or the number of a call of the model in sampling, counted from the run's beginning), ``ranks``, and ``what``: a
    signal's name, "raise", or "wait" until the file ``for`` exists. With ``hangs`` the end after an error takes for
    ever, as it may where a device waits for another rank.
    """

    def __init__(self) -> None:
        self.fault: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
        self.num_batches = self.num_broadcasts = self.num_sampling_calls = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        original = torch.distributed.broadcast

        def counted(*args: Any, **options: Any) -> Any:
            self.num_broadcasts += 1
            return original(*args, **options)

        torch.distributed.broadcast = counted
        self.watch_sampling(trainer)

    def watch_sampling(self, trainer: pl.Trainer) -> None:
        original = Sampler._forward

        def forward(sampler: Sampler, *args: Any) -> Any:
            self.act(trainer, "sampling", self.num_sampling_calls)
            self.num_sampling_calls += 1
            return original(sampler, *args)

        Sampler._forward = forward

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step != getattr(self, "step", None):
            self.step, self.num_batches = trainer.global_step, 0
        self.act(trainer, "train", self.num_batches)
        self.num_batches += 1

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.act(trainer, "validation", args[2])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        with Path(trainer.default_root_dir, f"losses_rank{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{self.step} {float(outputs['loss']).hex()}\n")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weight = next(pl_module.parameters())
        if isinstance(weight, DTensor):
            kinds = " ".join(type(placement).__name__.strip("_") for placement in weight.placements)
            place = Path(trainer.default_root_dir, f"placement_rank{trainer.global_rank}.txt")
            groups = weight.device_mesh.get_all_groups()
            timeouts = {group._get_backend(weight.device).options._timeout for group in groups}
            place.write_text(f"{weight.device_mesh.mesh.tolist()} {kinds} {' '.join(map(str, timeouts))}")
        Path(trainer.default_root_dir, f"broadcasts_rank{trainer.global_rank}.txt").write_text(str(self.num_broadcasts))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.fault.get("hangs"):
            time.sleep(1000)

    def act(self, trainer: pl.Trainer, when: str, batch: int) -> None:
        fault = self.fault
        if not fault or (fault["when"], fault["step"], fault["batch"]) != (when, trainer.global_step, batch):
            return
        if trainer.global_rank in fault["ranks"]:
            if fault["what"] == "raise":
                raise RuntimeError("the batch is cursed")
            if fault["what"] == "wait":
                wait_for(Path(fault["for"]), Path(trainer.default_root_dir, "waiting.txt"))
                return
            os.kill(os.getpid(), signal.Signals[fault["what"]])


def wait_for(path: Path, sign: Path) -> None:
    """Return when the file exists; the sign says that somebody waits for it."""
    sign.touch()
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
