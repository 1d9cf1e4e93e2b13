"""Distillation in two processes against one, copied or sharded, with checkpoints of adapters and resumes from them.

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
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.ema import EMA
from datamodules.captioned_digits import CaptionedDigitsDataModule
from datamodules.digits import DigitsDataModule
from flexidit import create_model, load_checkpoint
from flexidit.checkpoint import save_checkpoint
from flexidit.patch_size import PatchSize
from lightning_modules import Distillation
from lightning_modules.draws import draw_patch_size
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

TINY = {"input_size": 8, "in_channels": 1, "depth": 2, "hidden_size": 32, "num_heads": 2}
GLOBAL_BATCH, STEPS, STOP = 16, 5, 3
RESUMES = ("file", "folder")
SIZES = [PatchSize.parse(size) for size in (2, 4, 8)]
SEED = next(  # the larger size is first drawn after the stop: its moments are not in the checkpoint
    seed
    for seed in range(1000)
    if [draw_patch_size(SIZES, [0, 1, 1], seed, step) for step in range(STEPS)] == [SIZES[i] for i in (1, 1, 1, 2, 1)]
)


class Record(Callback):
    """Loss of every step, and what trains at the end, gathered."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: full(value) for name, value in pl_module.state_dict().items()}


def full(value: Tensor) -> Tensor:
    return value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()


def train(
    folder: Path,
    name: str,
    world_size: int,
    strategy: Any = "auto",
    precision: Any = "32-true",
    variant: str = "TextDiT",
    weak: tuple[int, ...] = (4, 8),
    steps: int = STEPS,
    ckpt_path: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Some steps of distillation, with validation and EMA."""
    target = TargetSettings(checkpoint=str(folder / f"{variant}.safetensors"))
    flex = FlexSettings(list(weak), recipe="lora", rank=4)
    module = Distillation(target, flex, OptimizerSettings(lr=1e-2), seed=SEED, **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_steps=steps,
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
    kind = CaptionedDigitsDataModule if variant == "TextDiT" else DigitsDataModule
    trainer.fit(module, kind(batch_size=GLOBAL_BATCH // world_size), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    sizes = [module.patch_size_at(step).name for step in range(steps)]
    return {"losses": torch.stack(record.losses), "weights": record.weights, "sizes": sizes}


def sharded(folder: bool = False) -> ModelParallelStrategy:
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=folder)


def worker(folder: Path) -> None:
    results = {
        "ddp_labels": train(folder, "ddp_labels", 2, "ddp", "64-true", "DiT"),
        "ddp": train(folder, "ddp", 2, "ddp"),
        "ddp_one_size": train(folder, "ddp_one_size", 2, "ddp", weak=(4,)),
        "fsdp": train(folder, "fsdp", 2, sharded(), gradient_checkpointing=True),
    }
    for name in RESUMES:
        train(folder, f"stopped_{name}", 2, sharded(name == "folder"), steps=STOP)
        path = folder / f"stopped_{name}.ckpt"
        results[f"resumed_{name}"] = train(folder, f"resumed_{name}", 2, sharded(), ckpt_path=path)
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, randomised: Any, torchrun: Any) -> Path:
    folder = tmp_path_factory.mktemp("distillation")
    for variant, more in (("TextDiT", {}), ("DiT", {"num_classes": 10})):
        save_checkpoint(
            randomised(create_model(f"{variant}-Tiny/2", **TINY, **more)), folder / f"{variant}.safetensors"
        )
    torchrun(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("run", ["ddp_labels", "ddp", "ddp_one_size", "fsdp"])
def test_ranks_hold_the_same_adapters_and_drew_the_same_patch_sizes(ranks: list[Any], run: str) -> None:
    first, second = (rank[run] for rank in ranks)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["sizes"] == second["sizes"]
    assert not torch.equal(first["losses"], second["losses"])  # their samples differ


@pytest.mark.parametrize(
    "run, options, tolerance",
    [
        ("ddp_labels", {"precision": "64-true", "variant": "DiT"}, 1e-8),
        ("ddp", {}, 1e-4),
        ("ddp_one_size", {"weak": (4,)}, 1e-4),
    ],
)
def test_two_processes_train_as_one_does_with_the_whole_batch(
    ranks: list[Any], folder: Path, run: str, options: dict[str, Any], tolerance: float
) -> None:
    alone = train(folder, f"alone_{run}", 1, **options)
    both = (ranks[0][run]["losses"] + ranks[1][run]["losses"]) / 2
    torch.testing.assert_close(both, alone["losses"], rtol=tolerance, atol=tolerance)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(ranks[0][run]["weights"][name], value, rtol=0, atol=10 * tolerance)


def test_sharded_training_has_the_losses_of_copies(ranks: list[Any]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["fsdp"]["losses"], rank["ddp"]["losses"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", ["ddp", "fsdp"])
def test_any_checkpoint_is_one_file_of_adapters(folder: Path, ranks: list[Any], run: str) -> None:
    state = torch.load(folder / f"{run}.ckpt", weights_only=True)["state_dict"]
    trained = ranks[0][run]["weights"]
    assert state.keys() == trained.keys()
    raw = load_checkpoint(folder / f"{run}.ckpt", prefer_ema=False).state_dict()
    assert all(torch.equal(raw[name.removeprefix("model.")], value) for name, value in trained.items())
    average = load_checkpoint(folder / f"{run}.ckpt").state_dict()
    assert not torch.equal(average["size_embedder.1x4x4"], raw["size_embedder.1x4x4"])


@pytest.mark.parametrize("name", RESUMES)
def test_sharded_training_goes_on_where_it_stopped(folder: Path, ranks: list[Any], name: str) -> None:
    assert (folder / f"stopped_{name}.ckpt").is_dir() == (name == "folder")
    for rank in ranks:
        whole, resumed = rank["fsdp"], rank[f"resumed_{name}"]
        torch.testing.assert_close(resumed["losses"], whole["losses"][STOP:], rtol=1e-5, atol=1e-6)


def test_one_process_goes_on_from_a_sharded_checkpoint(folder: Path, ranks: list[Any]) -> None:
    alone = train(folder, "alone_resumed", 1, ckpt_path=folder / "stopped_file.ckpt")
    both = (ranks[0]["fsdp"]["losses"] + ranks[1]["fsdp"]["losses"])[STOP:] / 2
    torch.testing.assert_close(alone["losses"], both, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
