"""A sharded Wan, distilled in two processes, against one process; its checkpoints on one, two and four.

Run as a script under ``torchrun``, this file is the worker: ``FOLDER PART``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from callbacks.ema import EMA
from datamodules.moving_digits import MovingDigitsDataModule
from flexidit import create_model, flexify
from flexidit.checkpoint import save_checkpoint
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize
from lightning_modules import TextToVideo
from lightning_modules.draws import draw_patch_size
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings
from lightning_modules.sharding import shard

TINY = {"input_size": (5, 16, 16), "depth": 2, "hidden_size": 48, "num_heads": 2}  # frames that 2x2x2 does not divide
GLOBAL_BATCH, STEPS, STOP = 8, 5, 3
SIZES = [PatchSize.parse(size) for size in ("1x2x2", "2x2x2", "1x4x4")]
SEED = next(  # the second mode is first drawn after the stop: its moments are not in the checkpoint
    seed
    for seed in range(1000)
    if [draw_patch_size(SIZES, [0, 1, 1], seed, step) for step in range(STEPS)] == [SIZES[i] for i in (1, 1, 1, 2, 1)]
)


@dataclass
class Counted(TargetSettings):
    """Says how often it was asked to build the target."""

    num_built: int = 0

    def build(self) -> FlexiTransformer:
        self.num_built += 1
        return super().build()


class Record(Callback):
    """Loss of every step; weights before the first and after the last, gathered; types of what is kept and passed."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.times: list[Tensor] = []
        self.inputs: set[torch.dtype] = set()
        self.gathered: dict[str, torch.dtype] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = whole(pl_module)
        model: Any = pl_module.model
        model.register_forward_pre_hook(lambda _, args: self.times.append(args[1]))
        model.blocks[0].register_forward_pre_hook(self._see)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = whole(pl_module)
        self.kept = {p.dtype for p in pl_module.parameters()}

    def _see(self, block: nn.Module, args: Any) -> None:
        tokens, modulation, rotations, _ = args
        self.inputs |= {value.dtype for value in (tokens, modulation, *rotations[0])}
        self.gathered = {name: p.dtype for name, p in block.named_parameters()}


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, gathered."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: full(tensor.detach()) for name, tensor in tensors}


def full(value: Tensor) -> Tensor:
    return value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()


def train(
    folder: Path,
    name: str,
    world_size: int = 1,
    strategy: Any = "auto",
    precision: Any = "32-true",
    steps: int = STEPS,
    ckpt_path: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Some steps of distillation, with validation and EMA."""
    target = Counted(checkpoint=str(folder / "wan.safetensors"))
    flex = FlexSettings(["2x2x2", "1x4x4"], recipe="lora", rank=4)
    module = TextToVideo(target, flex, OptimizerSettings(lr=1e-2), seed=SEED, **options)
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
        limit_val_batches=1,
        val_check_interval=2,
        default_root_dir=folder,
    )
    data = MovingDigitsDataModule(num_frames=5, batch_size=GLOBAL_BATCH // world_size)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    seen = {"start": record.start, "end": record.end, "times": record.times, "inputs": record.inputs}
    types = {"gathered": record.gathered, "kept": record.kept, "num_built": target.num_built}
    sizes = [module.patch_size_at(step).name for step in range(steps)]
    return {"losses": torch.stack(record.losses), "sizes": sizes, "base": module.base_identity, **seen, **types}


def sharded(world_size: int, folder: bool = False) -> ModelParallelStrategy:
    return ModelParallelStrategy(world_size, 1, save_distributed_checkpoint=folder)


def train_in_two(folder: Path) -> dict[str, Any]:
    results = {
        "float32": train(folder, "float32", 2, sharded(2), gradient_checkpointing=True),
        "mixed": train(folder, "mixed", 2, sharded(2), "bf16-mixed"),
        "half": train(
            folder, "half", 2, sharded(2), "bf16-mixed", gather_dtype="bfloat16", gradient_checkpointing=True
        ),
        "placed": place(),
    }
    for kind in ("file", "folder"):
        train(folder, f"stopped_{kind}", 2, sharded(2, kind == "folder"), steps=STOP)
    try:
        train(folder / "nowhere", "missing", 2, sharded(2))
    except FileNotFoundError as error:
        results["error"] = str(error)
    return results


def place() -> bool:
    """Whether a model has rank 0's tensors after it was sharded, where ranks had different ones."""
    torch.manual_seed(torch.distributed.get_rank())
    model = flexify(create_model("VideoDiT-Tiny", **TINY), ["1x4x4"], "lora", rank=4)
    tensors = [whole(model)]
    torch.distributed.broadcast_object_list(tensors, src=0)
    shard(model, init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel")), "bfloat16")
    placed = whole(model)
    assert "pos_embed_1x4x4" in placed  # derived, in no state dict
    return placed.keys() == tensors[0].keys() and all(torch.equal(placed[name], tensors[0][name]) for name in placed)


def resume(folder: Path) -> dict[str, Any]:
    world_size = int(os.environ["WORLD_SIZE"])
    results = {}
    for kind in ("file", "folder"):
        path, name = folder / f"stopped_{kind}.ckpt", f"resumed_{kind}_{world_size}"
        results[kind] = train(folder, name, world_size, sharded(world_size), ckpt_path=path)
    return results


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"train": train_in_two, "resume": resume}


def worker(folder: Path, part: str) -> None:
    results = PARTS[part](folder)
    world_size = torch.distributed.get_world_size()
    torch.save(results, folder / f"{part}_{torch.distributed.get_rank()}_of_{world_size}.pt")


def launch(folder: Path, part: str, num_processes: int) -> subprocess.Popen[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads than cores would wait for one another
    return subprocess.Popen([*run, __file__, str(folder), part], stderr=subprocess.PIPE, text=True, env=alone)


def finish(process: subprocess.Popen[str]) -> None:
    _, messages = process.communicate(timeout=600)
    assert process.returncode == 0, messages[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    torch.manual_seed(0)  # fixtures of a module come before that of each test
    model = create_model("Wan-Tiny", **TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)  # a fresh model outputs zero
    save_checkpoint(model, folder / "wan.safetensors")
    finish(launch(folder, "train", 2))
    for process in [launch(folder, "resume", num_processes) for num_processes in (1, 4)]:
        finish(process)
    return folder


def results_of(folder: Path, part: str, world_size: int) -> list[dict[str, Any]]:
    paths = (folder / f"{part}_{rank}_of_{world_size}.pt" for rank in range(world_size))
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return results_of(folder, "train", 2)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return train(folder, "alone")


def mean_losses(results: list[dict[str, Any]], run: str) -> Tensor:
    return torch.stack([rank[run]["losses"] for rank in results]).mean(dim=0)


def test_only_rank_0_reads_the_target_and_all_have_its_weights(ranks: list[Any], alone: dict[str, Any]) -> None:
    assert [rank["float32"]["num_built"] for rank in ranks] == [1, 0]
    for rank in ranks:
        start = rank["float32"]["start"]
        assert start.keys() == alone["start"].keys()
        assert all(torch.equal(start[name], value) for name, value in alone["start"].items())  # adapters too
        assert rank["float32"]["base"] == alone["base"]
        assert rank["placed"]


def test_an_error_of_rank_0_ends_all_ranks_with_its_sentence(ranks: list[Any]) -> None:
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "there is no checkpoint at" in ranks[0]["error"]


def test_a_sharded_run_has_the_losses_weights_and_average_of_one_process(
    ranks: list[Any], alone: dict[str, Any], folder: Path
) -> None:
    assert all(rank["float32"]["sizes"] == alone["sizes"] for rank in ranks)
    assert set(alone["sizes"]) == {"2x2x2", "1x4x4"}
    torch.testing.assert_close(mean_losses(ranks, "float32"), alone["losses"], rtol=1e-4, atol=1e-5)
    for name, value in alone["end"].items():
        torch.testing.assert_close(ranks[0]["float32"]["end"][name], value, rtol=0, atol=1e-3)
    ours, theirs = (average_of(folder / f"{name}.ckpt") for name in ("float32", "alone"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-3)


def average_of(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["callbacks"]["EMA"]["average"]


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_any_number_of_ranks_goes_on_from_a_checkpoint_of_two(
    folder: Path, ranks: list[Any], kind: str, world_size: int
) -> None:
    assert (folder / f"stopped_{kind}.ckpt").is_dir() == (kind == "folder")
    resumed = mean_losses(results_of(folder, "resume", world_size), kind)
    torch.testing.assert_close(resumed, mean_losses(ranks, "float32")[STOP:], rtol=1e-4, atol=1e-5)
    ours, theirs = (average_of(folder / f"{name}.ckpt") for name in (f"resumed_{kind}_{world_size}", "float32"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-3)


def test_one_unsharded_process_goes_on_from_a_sharded_checkpoint(folder: Path, ranks: list[Any]) -> None:
    resumed = train(folder, "alone_resumed", ckpt_path=folder / "stopped_file.ckpt")
    torch.testing.assert_close(resumed["losses"], mean_losses(ranks, "float32")[STOP:], rtol=1e-4, atol=1e-5)


def test_weights_gathered_in_half_give_what_autocast_gives(ranks: list[Any], alone: dict[str, Any]) -> None:
    for rank in ranks:
        half, mixed = rank["half"], rank["mixed"]
        assert torch.equal(half["losses"][0], mixed["losses"][0])
        torch.testing.assert_close(half["losses"], mixed["losses"], rtol=1e-2, atol=0)
    torch.testing.assert_close(mean_losses(ranks, "half"), alone["losses"], rtol=5e-2, atol=0)


def test_in_half_only_the_layers_of_blocks_are_gathered(ranks: list[Any], folder: Path) -> None:
    for rank in ranks:
        half, mixed = rank["half"], rank["mixed"]
        assert half["inputs"] == {torch.float32}  # tokens, modulation, rotations
        assert all(torch.equal(*pair) for pair in zip(half["times"], mixed["times"], strict=False))
        assert all(times.dtype == torch.float32 for times in half["times"])
        kinds = {name.rpartition(".")[0].rpartition(".")[2] or name: dtype for name, dtype in half["gathered"].items()}
        assert {name for name, dtype in kinds.items() if dtype == torch.float32} == {
            "modulation", "norm_q", "norm_k", "norm3"
        }  # fmt: skip
        assert half["kept"] == {torch.float32}
    saved = torch.load(folder / "half.ckpt", weights_only=True)
    moments = [value for state in saved["optimizer_states"][0]["state"].values() for value in state.values()]
    tensors = [*saved["state_dict"].values(), *saved["callbacks"]["EMA"]["average"].values(), *moments]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
