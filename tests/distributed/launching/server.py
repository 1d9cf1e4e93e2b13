"""Imports the framework once, then forks a process for each command: importing takes longer than the runs of the tests.

Reads lines of JSON: ``{"argv": [...], "env": {...}, "folder": ..., "output": ...}`` is answered with the process's
number, and ``{"wait": number, "timeout": seconds}`` with its exit code, -N after signal N, or null if it still runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

import flexidit.commands.training  # noqa: F401
from flexidit.cli import main
from lightning_modules import class_conditional, sharded_strategy  # noqa: F401


def start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["folder"])
    os.environ.update(request["env"])
    sys.argv = ["flexidit"]
    os._exit(exit_code(request["argv"]))


def exit_code(argv: list[str]) -> int:
    """What Python would exit with."""
    try:
        return main(argv)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def wait(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.02)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = wait(request["wait"], request["timeout"]) if "wait" in request else start(request)
        print(json.dumps(answer), flush=True)
