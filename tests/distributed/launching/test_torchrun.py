"""Two "nodes" on loopback, a torchrun on each, of which one is lost and comes back; and a torchrun that is ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.processes import free_port

DDP = {"strategy": "ddp"}
FIT = ["-m", "flexidit.cli", "fit", "-c", "run.yaml", "--ckpt_path=last"]


@contextmanager
def agent(folder: Path, environment: dict[str, str], name: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """A torchrun and its processes; all of them are gone afterwards."""
    with (folder / f"{name}.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *args],
            env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            end_session(process)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill an agent and, since it gives each process a session of its own, its children first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = children.read_text().split() if children.exists() else []
    for pid in [process.pid, *map(int, pids)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], bool], *agents: subprocess.Popen[bytes], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in agents)
        time.sleep(0.05)


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write_config: Any, fit: Any) -> Path:
    """A run on two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(folder, **DDP)
    assert [code for code, _ in fit(folder, world_size=2)] == [0, 0]
    return folder


def test_a_node_that_is_killed_and_restarted_costs_the_steps_since_the_checkpoint(
    tmp_path: Path, whole: Path, write_config: Any, losses: Any, process_environment: dict[str, str]
) -> None:
    write_config(tmp_path, **DDP, num_nodes=2)
    port = free_port()
    pause = {"when": "train", "step": 5, "batch": 0, "ranks": [1], "what": "wait", "for": "go"}
    # Without it a torchrun that survives tells a new one nothing, which gives up after a minute (torch 2.13).
    shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**process_environment, **shared, "FAULT": json.dumps(pause)}
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job"]
    heartbeat = "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=3"  # of 5 seconds, usually
    args = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", *rendezvous, heartbeat, *FIT]
    args.append("--trainer.callbacks.init_args.every_n_train_steps=2")
    with ExitStack() as nodes:
        first = nodes.enter_context(agent(tmp_path, environment, "first", *args))
        wait_for(lambda: is_open(port), first)  # it keeps the rendezvous: it is the other that may be lost
        second = nodes.enter_context(agent(tmp_path, environment, "second", *args))
        wait_for((tmp_path / "run" / "waiting.txt").exists, first, second)
        end_session(second)
        (tmp_path / "go").touch()
        again = nodes.enter_context(agent(tmp_path, environment, "second", *args))
        codes = [process.wait(120) for process in (first, again)]
    assert codes == [0, 0], (tmp_path / "first.txt").read_text()[-3000:]
    for rank in range(2):
        seen = losses(tmp_path, rank)
        assert set(seen) == set(losses(whole, rank))  # what was done twice was done alike
        assert [int(line.split()[0]) for line in seen] == [*range(5), *range(4, 8)]


def test_a_torchrun_that_is_told_to_end_leaves_a_checkpoint(
    tmp_path: Path, whole: Path, write_config: Any, fit: Any, losses: Any, process_environment: dict[str, str]
) -> None:
    write_config(tmp_path, **DDP)
    pause = {"when": "train", "step": 3, "batch": 0, "ranks": [0], "what": "wait", "for": "go"}
    environment = {**process_environment, "FAULT": json.dumps(pause)}
    args = ["--standalone", "--nproc-per-node=2", *FIT, "--trainer.devices=2"]
    with agent(tmp_path, environment, "agent", *args) as process:
        wait_for((tmp_path / "run" / "waiting.txt").exists, process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        (tmp_path / "go").touch()
        assert process.wait(60) != 0
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert [code for code, _ in fit(tmp_path, world_size=2)] == [0, 0]
    assert [losses(tmp_path, rank) for rank in range(2)] == [losses(whole, rank) for rank in range(2)]
