"""The scripts for SLURM from beginning to end, with stand-ins for its commands: signal, requeue, second start."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPTS = sorted((Path(__file__).resolve().parents[3] / "scripts" / "slurm").glob("*.sbatch"))
TASKS = 2

# Starts the tasks of a step as srun does: what each is told, signals passed on, the highest exit code returned.
SRUN = """#!{python}
import os, signal, subprocess, sys
args = [arg for arg in sys.argv[1:] if not arg.startswith("--kill-on-bad-exit")]
tasks = []
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
for rank in range({tasks}):
    told = dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0")
    tasks.append(subprocess.Popen(args, env=dict(os.environ, **told)))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> scontrol.txt\n'
FLEXIDIT = '#!/bin/sh\nexec {python} -m flexidit.cli "$@"\n'


@pytest.fixture
def cluster(tmp_path: Path, write_config: Callable[..., Path], repository: Path) -> Path:
    """A folder with a recipe, the trainer configs, and ``bin`` with SLURM's commands."""
    write_config(tmp_path)
    (tmp_path / "configs").symlink_to(repository / "configs")
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "flexidit": FLEXIDIT}.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(text.format(python=sys.executable, tasks=TASKS) if "{" in text else text)
        command.chmod(0o755)
    return tmp_path


@contextmanager
def submitted(folder: Path, environment: dict[str, str], script: Path) -> Iterator[subprocess.Popen[str]]:
    """The script as SLURM runs it on the first node of an allocation of one."""
    sizes = {"SLURM_NTASKS": TASKS, "SLURM_NTASKS_PER_NODE": TASKS, "SLURM_JOB_NUM_NODES": 1, "SLURM_NNODES": 1}
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "flexidit", "SLURM_NODELIST": "127.0.0.1"}
    told = {**{name: str(value) for name, value in sizes.items()}, **job}
    path = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    process = subprocess.Popen(
        ["bash", str(script), "run.yaml", "--trainer.accelerator=cpu"],
        env={**environment, **told, "PATH": path}, cwd=folder, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all ended
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_usr1_has_the_job_requeued_and_its_second_start_continues(
    cluster: Path, process_environment: dict[str, str], losses: Any
) -> None:
    script = next(path for path in SCRIPTS if path.stem == "ddp")
    pause = {"when": "train", "step": 3, "batch": 0, "ranks": [0], "what": "wait", "for": "signalled.txt"}
    with submitted(cluster, {**process_environment, "FAULT": json.dumps(pause)}, script) as job:
        wait_for(cluster / "run" / "waiting.txt", job)
        job.send_signal(signal.SIGUSR1)  # sbatch --signal=B:SIGUSR1
        time.sleep(0.5)
        (cluster / "signalled.txt").touch()
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 75, output
    assert (cluster / "scontrol.txt").read_text() == "requeue 4242\n"
    assert "stopped by SIGUSR1 at step 4" in output
    assert not list(cluster.rglob("hpc_ckpt*"))

    with submitted(cluster, process_environment, script) as job:
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    for rank in range(TASKS):
        assert [int(line.split()[0]) for line in losses(cluster, rank)] == list(range(8))
    assert (cluster / "scontrol.txt").read_text() == "requeue 4242\n"


def wait_for(path: Path, job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)


RANKS = {  # instead of a training: leaves in time, does not, and is killed by the signal
    "leaves": ("trap 'exit 75' USR1; touch up; while true; do sleep 0.1 & wait; done", "", 75),
    "is busy": ("trap 'n=0' USR1; touch up; for i in 1 2 3 4; do sleep 0.6 & wait; done", "requeue 4242\n", 0),
    "dies": ("touch up; exec sleep 30", "requeue 4242\n", 138),
}
SLEEP = 'case "$1" in 240) exec /bin/sleep 1;; *) exec /bin/sleep "$1";; esac'


@pytest.mark.parametrize("rank, requeued, code", RANKS.values(), ids=RANKS)
def test_the_script_requeues_a_job_whose_ranks_cannot(
    rank: str, requeued: str, code: int, cluster: Path, process_environment: dict[str, str]
) -> None:
    for name, text in {"srun": rank, "sleep": SLEEP}.items():
        (cluster / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (cluster / "bin" / name).chmod(0o755)
    with submitted(cluster, process_environment, SCRIPTS[0]) as job:
        wait_for(cluster / "up", job)
        time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=30)
    assert job.returncode == code, output
    calls = cluster / "scontrol.txt"
    assert (calls.read_text() if calls.exists() else "") == requeued


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_of_its_trainer_config_and_asks_for_what_it_uses(script: Path, repository: Path) -> None:
    text = script.read_text()
    assert f"parallel={script.stem}\n" in text
    assert (repository / "configs" / "trainer" / f"{script.stem}.yaml").is_file()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    trainer = yaml.safe_load((repository / "configs" / "trainer" / "slurm.yaml").read_text())["trainer"]
    assert int(directives["ntasks-per-node"]) == int(directives["gpus-per-node"]) == trainer["devices"]
    assert int(directives["nodes"]) == trainer["num_nodes"]
    assert directives["signal"] == "B:SIGUSR1@300"
    assert "requeue" in directives
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    first, *others = (path.read_text() for path in SCRIPTS)
    body = first[first.index("set -euo") :].replace(f"parallel={SCRIPTS[0].stem}", "")
    for path, other in zip(SCRIPTS[1:], others, strict=True):
        assert other[other.index("set -euo") :].replace(f"parallel={path.stem}", "") == body
