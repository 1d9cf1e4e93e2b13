"""Runs of ``flexidit fit`` in processes of their own, of one rank or several, that something happens to."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.processes import free_port

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


class Server:
    """Starts commands in the process that has imported everything already (``server.py``)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.pids: set[int] = set()

    def start(self, folder: Path, argv: list[str], output: Path, **env: str) -> int:
        pid = int(self._ask({"argv": argv, "env": env, "folder": str(folder), "output": str(output)}))
        self.pids.add(pid)
        return pid

    def wait(self, pid: int, timeout: float) -> int | None:
        """Exit code, or -N after signal N; a process that takes longer is killed, and None."""
        code = self._ask({"wait": pid, "timeout": timeout})
        if code is None:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self._ask({"wait": pid, "timeout": 10})
        self.pids.discard(pid)
        return code

    def close(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def environment() -> dict[str, str]:
    """That of a process that finds the framework and the tests' own callback."""
    paths = [str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def process_environment() -> dict[str, str]:
    """For processes that the tests start themselves."""
    return environment()


def ranks(world_size: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank of one node."""
    if world_size == 1:
        return [{}]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "x",
    }
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return [{**shared, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


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
def fit(server: Server) -> Callable[..., list[tuple[int | None, str]]]:
    """Run a folder's ``run.yaml`` on so many ranks; returns (exit code, output) of each, None after ``timeout``."""

    def run(
        folder: Path, *options: str, world_size: int = 1, fault: dict[str, Any] | None = None, timeout: float = 60
    ) -> list[tuple[int | None, str]]:
        argv = ["fit", "-c", "run.yaml", "--ckpt_path=last", f"--trainer.devices={world_size}", *options]
        outputs = [folder / f"output_rank{rank}.txt" for rank in range(world_size)]
        told = {"FAULT": json.dumps(fault)} if fault else {}
        pids = [
            server.start(folder, argv, output, **env, **told)
            for env, output in zip(ranks(world_size), outputs, strict=True)
        ]
        codes = []
        for pid in pids:
            if fault and fault["what"] == "SIGSTOP" and codes:  # one that hangs wakes up when rank 0 is gone
                os.kill(pid, signal.SIGCONT)
            codes.append(server.wait(pid, timeout))
        return [(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]

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
