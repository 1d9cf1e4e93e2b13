"""Two processes against one: the same global batch, the same losses and weights; sharded or copied.

Run as a script under ``torchrun``, this file is the worker: ``FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.ema import EMA
from datamodules.digits import DigitsDataModule
from flexidit import create_model, load_checkpoint
from flexidit.checkpoint import save_checkpoint
from lightning_modules import ClassConditional
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings

TINY = {"input_size": 8, "in_channels": 1, "num_classes": 10, "depth": 2, "hidden_size": 32, "num_heads": 2}
GLOBAL_BATCH, STEPS = 16, 5


class Record(Callback):
    """Loss of every step, and the weights at the end, gathered."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: full(value) for name, value in pl_module.state_dict().items()}


def full(value: Tensor) -> Tensor:
    return value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()


def train(
    folder: Path, name: str, world_size: int, strategy: Any = "auto", precision: Any = "32-true", **options: Any
) -> dict[str, Any]:
    """Some steps of fine-tuning, with validation and EMA."""
    module = ClassConditional(
        TargetSettings(checkpoint=str(folder / "target.safetensors")),
        FlexSettings([4]),
        optimizer=OptimizerSettings(lr=1e-2),
        **options,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_steps=STEPS,
        precision=precision,
        gradient_clip_val=0.5,
        callbacks=[record := Record(), EMA(0.8)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        limit_val_batches=2,
        val_check_interval=2,
        default_root_dir=folder,
    )
    trainer.fit(module, DigitsDataModule(batch_size=GLOBAL_BATCH // world_size))
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    steps = [module.patch_size_at(step).name for step in range(STEPS)]
    validation = {key: value.double() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    return {"losses": torch.stack(record.losses), "weights": record.weights, "sizes": steps, "validation": validation}


def worker(folder: Path) -> None:
    matching = MatchingSettings(0.5, chain={"4": 1, "2": 2}, num_timesteps=50)
    results = {
        "ddp": train(folder, "ddp", 2, DDPStrategy(), "64-true"),
        "ddp_matching": train(folder, "ddp_matching", 2, "ddp", matching=matching),
    }
    for name, sizes in {"nodes": (2, 1), "devices": (1, 2)}.items():
        strategy = ModelParallelStrategy(*sizes, save_distributed_checkpoint=False)
        checkpointed = {"matching": matching, "gradient_checkpointing": True}
        results[f"fsdp_{name}"] = train(folder, f"fsdp_{name}", 2, strategy, **checkpointed)
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, randomised: Any, torchrun: Any) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_checkpoint(randomised(create_model("DiT-Tiny/2", **TINY)), folder / "target.safetensors")
    torchrun(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("run", ["ddp", "ddp_matching", "fsdp_nodes", "fsdp_devices"])
def test_ranks_hold_the_same_model_and_drew_the_same_patch_sizes(ranks: list[Any], run: str) -> None:
    first, second = (rank[run] for rank in ranks)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["sizes"] == second["sizes"]
    assert len(set(first["sizes"])) == 2
    assert not torch.equal(first["losses"], second["losses"])  # their samples differ


def test_two_processes_train_as_one_does_with_the_whole_batch(ranks: list[Any], folder: Path) -> None:
    alone = train(folder, "alone", 1, precision="64-true")
    both = (ranks[0]["ddp"]["losses"] + ranks[1]["ddp"]["losses"]) / 2
    torch.testing.assert_close(both, alone["losses"], rtol=1e-9, atol=0)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["ddp"]["weights"][name], value, rtol=0, atol=1e-8)
    for name, value in alone["validation"].items():
        if "loss" in name:  # the gap is that of each process's first batch
            torch.testing.assert_close(ranks[0]["ddp"]["validation"][name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("run", ["fsdp_nodes", "fsdp_devices"])
def test_sharded_training_has_the_losses_of_copies(ranks: list[Any], run: str) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank[run]["losses"], rank["ddp_matching"]["losses"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", ["ddp", "fsdp_nodes", "fsdp_devices"])
def test_any_checkpoint_is_one_file_with_the_averaged_student(folder: Path, ranks: list[Any], run: str) -> None:
    model = load_checkpoint(folder / f"{run}.ckpt")
    raw = load_checkpoint(folder / f"{run}.ckpt", prefer_ema=False)
    weight, average = raw.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight
    torch.testing.assert_close(weight.double(), ranks[0][run]["weights"]["model.blocks.0.attn.qkv.weight"].double())
    assert not torch.equal(weight, average)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
