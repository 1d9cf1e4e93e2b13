"""Accumulation, clipping, averages and the matching loss under DDP and FSDP2 against one process with the whole batch.

Run as a script under ``torchrun``, this file is the worker: ``FOLDER``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from callbacks.ema import EMA
from datamodules.digits import DigitsDataModule
from flexidit import create_model
from flexidit.checkpoint import save_checkpoint
from lightning_modules import ClassConditional
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings

TINY = {"input_size": 8, "in_channels": 1, "num_classes": 10, "depth": 2, "hidden_size": 32, "num_heads": 2}
STEPS, CLIP = 4, 0.05  # gradients are longer, so that each step is clipped


class Fused(OptimizerSettings):
    """The fused kernel, which GPUs have by default, on a CPU too."""

    def build(self, parameters: Iterable[nn.Parameter], max_steps: float, fused: bool = True) -> Any:
        assert fused
        optimizer = AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, fused=True)
        return optimizer, LambdaLR(optimizer, self.factor(max_steps))


class Record(Callback):
    """Of every micro-batch the loss, of every step the norm before clipping; weights and average at the end."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        if (len(self.losses)) % trainer.accumulate_grad_batches == 0:
            self.norms.append(trainer.callback_metrics["train/grad_norm"].clone())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: full(value) for name, value in pl_module.state_dict().items()}
        average = next(callback for callback in trainer.callbacks if isinstance(callback, EMA)).average  # type: ignore[attr-defined]
        self.average = {name: full(value) for name, value in average.items()}
        self.is_fused = trainer.optimizers[0].param_groups[0]["fused"]


def full(value: Tensor) -> Tensor:
    return value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()


def train(
    folder: Path,
    world_size: int = 1,
    strategy: Any = "auto",
    precision: Any = "32-true",
    accumulate: int = 1,
    global_batch: int = 16,
    **options: Any,
) -> dict[str, Any]:
    """Some steps of fine-tuning; ``global_batch`` is that of a step."""
    kind = Fused if precision == "bf16-mixed" else OptimizerSettings
    target = TargetSettings(checkpoint=str(folder / "target.safetensors"))
    module = ClassConditional(target, FlexSettings([4]), optimizer=kind(lr=1e-2), **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_steps=STEPS,
        precision=precision,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
        callbacks=[record := Record(), EMA(0.5)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    trainer.fit(module, DigitsDataModule(batch_size=global_batch // world_size // accumulate))
    return {
        "losses": torch.stack(record.losses).view(STEPS, accumulate).sum(1),  # Lightning divides each
        "norms": torch.stack(record.norms),
        "weights": record.weights,
        "average": record.average,
        "sizes": [module.patch_size_at(step).name for step in range(STEPS)],
        "is_fused": record.is_fused,
    }


MATCHING: dict[str, Any] = {
    "precision": "64-true",
    "global_batch": 8,
    "matching": MatchingSettings(0.5, num_timesteps=50),
}
RUNS: dict[str, dict[str, Any]] = {  # what one process does too, without accumulation
    "ddp": {"precision": "64-true"},
    "fsdp": {},
    "ddp_mixed": {"precision": "bf16-mixed"},
    "fsdp_mixed": {"precision": "bf16-mixed"},
    "ddp_matching": MATCHING,
}


def worker(folder: Path) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    runs = RUNS if world_size == 2 else {"ddp_matching": MATCHING}
    results = {}
    for name, options in runs.items():
        strategy = ModelParallelStrategy(world_size, 1) if name.startswith("fsdp") else "ddp"
        accumulate = 1 if name == "ddp_matching" else 2
        results[name] = train(folder, world_size, strategy, accumulate=accumulate, **options)
    torch.save(results, folder / f"{torch.distributed.get_rank()}_of_{world_size}.pt")


def results_of(folder: Path, world_size: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}_of_{world_size}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, randomised: Any) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    save_checkpoint(randomised(create_model("DiT-Tiny/2", **TINY)), folder / "target.safetensors")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path, torchrun: Any) -> list[dict[str, Any]]:
    torchrun(__file__, folder)
    return results_of(folder, 2)


def assert_equal_training(ranks: list[dict[str, Any]], run: str, alone: dict[str, Any], tolerance: float) -> None:
    losses = torch.stack([rank[run]["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, alone["losses"], rtol=tolerance, atol=0)
    for rank in ranks:
        torch.testing.assert_close(rank[run]["norms"], alone["norms"], rtol=10 * tolerance, atol=0)
        for kind in ("weights", "average"):
            assert rank[run][kind].keys() == alone[kind].keys()
            for name, value in alone[kind].items():
                torch.testing.assert_close(rank[run][kind][name], value, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize(("run", "tolerance"), [("ddp", 1e-6), ("fsdp", 1e-3)])
def test_two_processes_that_accumulate_train_as_one_does_with_the_whole_batch(
    folder: Path, ranks: list[Any], run: str, tolerance: float
) -> None:
    alone = train(folder, **RUNS[run])
    assert all(norm > CLIP for norm in alone["norms"])
    assert_equal_training(ranks, run, alone, tolerance)


@pytest.mark.parametrize("run", ["ddp_mixed", "fsdp_mixed"])
def test_so_they_do_in_mixed_precision_with_the_fused_optimizer(folder: Path, ranks: list[Any], run: str) -> None:
    alone = train(folder, **RUNS[run])
    assert alone["is_fused"] and all(rank[run]["is_fused"] for rank in ranks)
    losses = torch.stack([rank[run]["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, alone["losses"], rtol=2e-2, atol=0)
    for rank in ranks:
        torch.testing.assert_close(rank[run]["norms"], alone["norms"], rtol=5e-2, atol=0)


def test_mixed_precision_is_clipped_alike_in_copies_and_shards(ranks: list[Any]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["fsdp_mixed"]["norms"], rank["ddp_mixed"]["norms"], rtol=1e-2, atol=0)


def test_all_ranks_draw_the_same_patch_sizes(ranks: list[Any]) -> None:
    for run in RUNS:
        assert ranks[0][run]["sizes"] == ranks[1][run]["sizes"]
        assert len(set(ranks[0][run]["sizes"])) == 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_matching_loss_is_that_of_the_global_batch(
    folder: Path, ranks: list[Any], torchrun: Any, world_size: int
) -> None:
    if world_size != len(ranks):
        torchrun(__file__, folder, world_size)
    split = results_of(folder, world_size)
    assert_equal_training(split, "ddp_matching", train(folder, **MATCHING), 1e-6)
    without = train(folder, **{**MATCHING, "matching": None})
    assert not torch.allclose(without["losses"], split[0]["ddp_matching"]["losses"])


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
