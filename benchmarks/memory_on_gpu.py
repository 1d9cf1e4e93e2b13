"""Memory of training measured on one GPU, beside what ``memory.py`` computes from the same configs.

    python benchmarks/memory_on_gpu.py --gpus 1 8 --json memory.json
    python benchmarks/memory_on_gpu.py configs/text_to_video/wan_14b.yaml --gpus 8 --compile

A recipe's own module, precision, average and guard train some steps on random data, with weights that are left as
memory was: a size does not depend on them. "1" is a GPU by itself. For more, the model is sharded (FSDP2) as if so many
took part and this were the first of them: torch's fake process group has buffers of the true sizes and sends nothing.
Each measurement has a process of its own. Reported is the most that tensors took at once after the first step, and what
the allocator held for them; what computed and measured differ by is in the last column.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from memory import CONFIGS, DEFAULTS, GIB, Setting, memory_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from callbacks.ema import EMA
from flexidit.conditions import Captions
from flexidit.config import CaptionedConfig
from flexidit.variants import variant_config
from lightning_modules.base import DiffusionModule
from lightning_modules.sharded_strategy import ShardedStrategy


class Batches(IterableDataset[Any]):
    """The same random batch, for ever."""

    def __init__(self, config: Any, batch_size: int) -> None:
        y: Any = torch.zeros(batch_size, dtype=torch.long)
        if isinstance(config, CaptionedConfig):
            shape = (batch_size, config.caption_length)
            y = Captions(torch.randn(*shape, config.caption_channels), torch.ones(shape, dtype=torch.bool))
        x = torch.randn(batch_size, config.in_channels, *config.input_size)
        self.batch = {"x": x, "y": y, "names": ["sample"] * batch_size}

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.batch


class Height(pl.Callback):
    """The most bytes at once in the steps after the first, in which moments and the average are made."""

    allocated = reserved = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if module.device.type == "cuda" and trainer.global_step == 1:
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if module.device.type == "cuda":
            self.allocated, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def measure(path: Path, num_gpus: int, accelerator: str, num_steps: int, compiled: bool) -> dict[str, Any]:
    """What one GPU of so many needs for a recipe, in bytes; 0 on a CPU."""
    recipe = yaml.safe_load(path.read_text())
    batches = Batches(_config_of(recipe), recipe["data"]["init_args"]["batch_size"])
    height = Height()
    with tempfile.TemporaryDirectory() as folder, _uninitialised():
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            num_nodes=num_gpus,
            strategy=_sharded(num_gpus) if num_gpus > 1 else "auto",
            precision=recipe["trainer"]["precision"],
            gradient_clip_val=recipe["trainer"].get("gradient_clip_val"),
            max_steps=num_steps,
            callbacks=[EMA(), height],
            default_root_dir=folder,  # for what the guard says of such weights
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        module = _module_of(recipe, compiled, is_sharded=num_gpus > 1)
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return {"allocated": height.allocated, "reserved": height.reserved}


def _config_of(recipe: dict[str, Any]) -> Any:
    target = recipe["model"]["init_args"]["target"]
    return variant_config(target["variant"], **target.get("overrides", {}))


def _module_of(recipe: dict[str, Any], compiled: bool, is_sharded: bool) -> DiffusionModule:
    """The recipe's, with a target that no file is needed for."""
    model = recipe["model"]
    target = {**model["init_args"]["target"], "checkpoint": None}
    target["overrides"] = {**target.get("overrides", {}), "class_dropout_prob": 0.0}  # these data have no null caption
    parser = ArgumentParser()
    parser.add_subclass_arguments(DiffusionModule, "model")
    arguments = {**model["init_args"], "target": target, "vae": None, "compile": compiled}
    if not is_sharded:
        arguments["gather_dtype"] = "float32"  # nothing else goes with it
    given = parser.parse_object({"model": {**model, "init_args": arguments}})
    return parser.instantiate_classes(given).model


def _sharded(num_gpus: int) -> ShardedStrategy:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_gpus)
    return ShardedStrategy(process_group_backend="fake")


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Random numbers for 14 B weights would take a minute."""
    names = ("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "kaiming_uniform_")
    with patch.multiple(nn.init, **{name: lambda tensor, *args, **kwargs: tensor for name in names}):
        yield


def measure_alone(path: Path, num_gpus: int, args: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` in a process of its own, beside what is computed."""
    options = ["--accelerator", args.accelerator, "--steps", str(args.steps), *(["--compile"] * args.compile)]
    command = [sys.executable, __file__, str(path), "--gpus", str(num_gpus), "--here", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | _as_first_of(num_gpus))
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1]) if done.returncode == 0 else {"allocated": None, "reserved": None}
    setting = Setting.read(path)
    computed = memory_of(setting, num_gpus).total
    row = {"recipe": path.stem, "batch": setting.batch_size, "gpus": num_gpus, "computed": computed, **found}
    print(row, file=sys.stderr)
    return row


def _as_first_of(num_gpus: int) -> dict[str, str]:
    """What torchrun tells a process."""
    if num_gpus == 1:
        return {}
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 1, "WORLD_SIZE": num_gpus}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "fake"}
    return {**{name: str(value) for name, value in numbers.items()}, **place}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a measurement, in GiB."""
    names = ("computed", "allocated", "reserved")
    lines = [f"{'recipe':<24} {'batch':>5} {'GPUs':>4} " + " ".join(f"{name:>10}" for name in names) + "  measured by"]
    for row in rows:
        sizes = " ".join("    failed" if row[name] is None else f"{row[name] / GIB:>10.1f}" for name in names)
        off = f"{row['allocated'] / row['computed'] - 1:+.0%}" if row["allocated"] else ""
        lines.append(f"{row['recipe']:<24} {row['batch']:>5} {row['gpus']:>4} {sizes}  {off:>11}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=[CONFIGS / f"{name}.yaml" for name in DEFAULTS])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="that weights are sharded over")
    parser.add_argument("--compile", action="store_true", help="blocks, as most recipes do")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--json", type=Path, help="write the measurements there, too")
    parser.add_argument("--here", action="store_true", help="one of them, in this process")
    args = parser.parse_args(arguments)
    if args.here:
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(args.configs[0], args.gpus[0], args.accelerator, args.steps, args.compile)))
        return 0
    rows = [measure_alone(path, num_gpus, args) for path in args.configs for num_gpus in args.gpus]
    device = torch.cuda.get_device_name() if args.accelerator == "cuda" else args.accelerator
    print(f"{device}, torch {torch.__version__}, {'compiled' if args.compile else 'eager'}; GiB")
    print(table(rows))
    if args.json is not None:
        setting = {"device": device, "torch": torch.__version__, "compile": args.compile, "steps": args.steps}
        args.json.write_text(json.dumps({"setting": setting, "measurements": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
