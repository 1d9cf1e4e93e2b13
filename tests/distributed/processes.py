"""Ranks as forked processes: what is slow to import is imported once, in a server that forks each of them.

The server has run nothing but imports, so no rank inherits a thread. Each rank leads a process group of its own, that a
kill takes its data workers too, and dies with the server.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

IMPORTED = (
    "tests.distributed.resume_cases",
    "flexidit.commands.training",
    "lightning_modules.class_conditional",
    "lightning_modules.sharded_strategy",
)
"""What any of its processes needs, and takes seconds."""

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


@cache
def fork_server() -> Any:
    """A context whose processes are forked from a server that has imported :data:`IMPORTED`; one thread each.

    There is one server in a process, for all who ask.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    folder = str(Path(__file__).resolve().parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != folder]
    own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([folder, *paths])}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


class Ranks:
    """The processes of one run, as ``torchrun`` would start them; leaving the block ends them.

    Args:
        context: of :func:`fork_server`.
        work: runs in each of them; a function of a module.
        arguments: of ``work``.
        num_processes: of the run.
        folder: for what each of them prints, ``output_rank0.txt`` ...; what is there is kept.
    """

    def __init__(
        self, context: Any, work: Callable[..., None], arguments: tuple[Any, ...], num_processes: int, folder: Path
    ) -> None:
        port = free_port()
        self.logs = [folder / f"output_rank{rank}.txt" for rank in range(num_processes)]
        self.processes = [
            context.Process(target=_begin, args=(work, arguments, rank, num_processes, port, str(log)))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def is_running(self) -> bool:
        """Whether none of them has ended."""
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """``kill -9`` of all of them, and of their workers."""
        for process in self.processes:
            for kill, target in ((os.killpg, process.pid), (os.kill, process.pid)):
                try:
                    kill(target, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for process in self.processes:
            process.join(10)

    def finish(self, timeout: float) -> None:
        """Wait for all of them.

        Raises:
            AssertionError: one failed, or was not ready in time; with the end of what it printed.
        """
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes) and time.monotonic() < end:
            if any(process.exitcode for process in self.processes):
                break  # the others would wait for it
            time.sleep(0.01)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        wrong = next((rank for rank, code in enumerate(codes) if code), None)
        wrong = next((rank for rank, code in enumerate(codes) if code is None), wrong) if wrong is None else wrong
        assert wrong is None, (
            f"rank {wrong} of {len(codes)}: exit codes {codes}\n{self.logs[wrong].read_text()[-3000:]}"
        )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _begin(
    work: Callable[..., None], arguments: tuple[Any, ...], rank: int, num_processes: int, port: int, log: str
) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of data workers; they would be forked from a server as well
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if num_processes > 1:
        os.environ |= _as_torchrun(rank, num_processes, port)
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # threads of gloo may wait for the other ranks
    sys.stdout.flush()
    os._exit(0)


def _as_torchrun(rank: int, num_processes: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
    sizes = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    here = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "forked"}
    return {**{name: str(value) for name, value in {**numbers, **sizes}.items()}, **here}
