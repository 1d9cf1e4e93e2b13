"""What it costs to guard every step: the norm of its gradients, the verdict, and reading it later.

    python benchmarks/step_guard.py --model DiT-S/4 --batch-size 16 --json step_guard.json
    python benchmarks/step_guard.py --model DiT-XL/2 --batch-size 32 --accelerator cuda --precision bf16-mixed --clip 1

One run trains on random latents, by turns with a guard and without one, so that a busy machine slows down both alike;
medians of the turns are reported. Without a guard gradients are measured only if they are clipped. A turn ends when the
device has done its work, so on a GPU what overlaps costs nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_modules import Pretraining
from lightning_modules.gradients import gradient_norm
from lightning_modules.guards import StepGuard
from lightning_modules.settings import TargetSettings


class Latents(Dataset[Any]):
    """The same random sample, for ever."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x, "y": torch.tensor(index % 10), "names": "sample"}


class TurnGuard(StepGuard):
    """Does nothing in every other turn."""

    is_on = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.is_on:
            super().on_before_backward(trainer, pl_module, loss)


class Turns(pl.Callback):
    """Milliseconds a step, of each turn; the first of both kinds is not counted."""

    def __init__(self, guard: TurnGuard, length: int) -> None:
        self.guard, self.length = guard, length
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self._started = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.length == 0:
            self.guard.is_on = batch_idx // self.length % 2 == 0
            self._started = perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.length:
            return
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = 1000 * (perf_counter() - self._started) / self.length
        if trainer.global_step > 2 * self.length:
            self.times[self.guard.is_on].append(elapsed)


class Model(Pretraining):
    """Without a guard, as Lightning would have it."""

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        guard = StepGuard.of(self.trainer)
        assert isinstance(guard, TurnGuard)
        if guard.is_on:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        guard._names = []
        optimizer.found_inf = None
        if gradient_clip_val:
            self.log("train/grad_norm", torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of all turns."""
    guard = TurnGuard()
    turns = Turns(guard, args.steps)
    model = Model(TargetSettings(args.model, {"input_size": args.input_size}))
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        gradient_clip_val=args.clip,
        max_steps=2 * args.steps * (args.turns + 1),
        callbacks=[guard, turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, DataLoader(Latents((4, args.input_size, args.input_size)), batch_size=args.batch_size))
    guarded, alone = (statistics.median(turns.times[is_on]) for is_on in (True, False))
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "guarded_ms": guarded,
        "alone_ms": alone,
        "overhead": guarded / alone - 1,
        "norm_ms": norm_ms(model.to(trainer.strategy.root_device)),  # a trainer that is done leaves it on the CPU
    }


def norm_ms(model: torch.nn.Module, repetitions: int = 20) -> float:
    """Milliseconds of the norm of all gradients: the least of some, for it drowns in the noise of whole steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.ones_like(p)
    times = []
    for _ in range(repetitions):
        started = perf_counter()
        float(gradient_norm(parameters))
        times.append(1000 * (perf_counter() - started))
    return min(times)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/4")
    parser.add_argument("--input-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--clip", type=float, default=None)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--turns", type=int, default=5, help="of each kind")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    found = measure(args)
    print(
        f"{args.model}, {found['parameters'] / 1e6:.0f} M parameters, batch {args.batch_size}, {args.accelerator}, "
        f"{args.precision}, clipping {args.clip}: {found['guarded_ms']:.1f} ms a step with a guard, "
        f"{found['alone_ms']:.1f} ms without ({found['overhead']:+.1%}); the norm alone {found['norm_ms']:.2f} ms"
    )
    if args.json is not None:
        args.json.write_text(json.dumps({"setting": vars(args) | {"json": str(args.json)}, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
