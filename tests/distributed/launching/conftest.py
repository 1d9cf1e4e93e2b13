"""Runs of ``flexidit fit`` in processes of their own, of one rank or several, that something happens to."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.launching import commands
from tests.distributed.processes import Ranks, fork_server

HERE = Path(__file__).parent

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_modules.ClassConditional",
        "init_args": {
            "target": {
                "variant": "DiT-Tiny/2",
                "overrides": {"input_size": 8, "in_channels": 1, "num_classes": 10, "depth": 1, "hidden_size": 32},
            },
            "flex": {"patch_sizes": [4]},
            "optimizer": {"lr": 1.0e-3, "warmup_steps": 8},
        },
    },
    "data": {"class_path": "datamodules.digits.DigitsDataModule", "init_args": {"batch_size": 64}},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "max_epochs": -1,
        "default_root_dir": "run",
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 3,
        "limit_val_batches": 2,
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": ".", "name": "run", "version": ""},
        },
        "callbacks": [
            {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.9}},
            {"class_path": "callbacks.step_progress.StepProgress", "init_args": {"refresh_every_n_steps": 1}},
            {"class_path": "probe.Probe"},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "dirpath": "run/checkpoints", "every_n_train_steps": 100, "save_top_k": 0, "save_last": True
                },
            },
        ],
    },
}  # fmt: skip

SAMPLING: list[dict[str, Any]] = [
    {
        "class_path": "callbacks.sample_grid.SampleGrid",
        "init_args": {"every_n_steps": 4, "every_n_epochs": None, "num_columns": 2, "num_sampling_steps": 3},
    },
    {
        "class_path": "callbacks.fid_flops.FIDFlops",
        "init_args": {
            "features": {"class_path": "flexidit.metrics.digit_classifier.DigitClassifier"},
            "budgets": [1.0, 0.64], "num_samples": 13, "batch_size": 4, "num_sampling_steps": 3,
        },
    },
]  # fmt: skip


def environment() -> dict[str, str]:
    """That of a process that finds the framework and the tests' own callback."""
    paths = [str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def process_environment() -> dict[str, str]:
    """For processes that the tests start themselves."""
    return environment()


@pytest.fixture(scope="session")
def write_config() -> Callable[..., Path]:
    """Write ``run.yaml`` of a small fine-tuning into a folder; keyword arguments go to the trainer."""

    def write(folder: Path, samples: bool = False, **trainer: Any) -> Path:
        config = copy.deepcopy(CONFIG)
        config["trainer"] |= trainer
        if samples:
            config["trainer"]["callbacks"][1:1] = SAMPLING
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        return folder / "run.yaml"

    return write


@pytest.fixture(scope="session")
def fit() -> Callable[..., list[tuple[int | None, str]]]:
    """Run a folder's ``run.yaml`` on so many ranks; returns (exit code, output) of each, None after ``timeout``."""

    def run(
        folder: Path, *options: str, world_size: int = 1, fault: dict[str, Any] | None = None, timeout: float = 60
    ) -> list[tuple[int | None, str]]:
        argv = ["fit", "-c", "run.yaml", "--ckpt_path=last", f"--trainer.devices={world_size}", *options]
        for earlier in folder.glob("output_rank*.txt"):
            earlier.unlink()
        told = {"FAULT": json.dumps(fault)} if fault else {}
        codes: list[int | None] = []
        with Ranks(fork_server(), commands.run, (argv, folder, told), world_size, folder) as ranks:
            for process in ranks.processes:
                if fault and fault["what"] == "SIGSTOP" and codes:  # one that hangs wakes up when rank 0 is gone
                    os.kill(process.pid, signal.SIGCONT)
                process.join(timeout)
                codes.append(process.exitcode)
                if codes[-1] is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return [(code, log.read_text()) for code, log in zip(codes, ranks.logs, strict=True)]

    return run


@pytest.fixture(scope="session")
def losses() -> Callable[[Path, int], list[str]]:
    """The loss of every batch of a rank, with its step."""
    return lambda folder, rank: (folder / "run" / f"losses_rank{rank}.txt").read_text().splitlines()


@pytest.fixture(scope="session")
def logged() -> Callable[[Path], dict[tuple[str, int], float]]:
    """What a run and those that continued it wrote for TensorBoard, by name and step."""

    def read(folder: Path) -> dict[tuple[str, int], float]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = {}
        for file in sorted((folder / "run").glob("events.*"), key=lambda path: path.stat().st_mtime):
            events = EventAccumulator(str(file)).Reload()
            for name in events.Tags()["scalars"]:
                found |= {(name, event.step): event.value for event in events.Scalars(name)}
        return found

    return read
