"""Errors of a job of several processes: each in a file of its own, the first one found out, and an end for all."""

from __future__ import annotations

import os
import re
import socket
import threading
import traceback
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

_LOST_PEER = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "NCCL", "timed out", "Timed out")
"""What collectives complain of when it is another rank that has failed."""


class RankErrors(Callback):
    """Writes the error of a rank to ``errors/rank003.txt`` in ``default_root_dir``: traceback, rank, host, step, time.

    The first rank to fail says so to the others before its connections close and make theirs fail too: through the
    job's key-value store, or, where that went with the rank that kept it, through these files. So each rank knows
    whether its own error is the cause or a consequence, and :attr:`sentence` names the first. A rank that is killed
    from outside leaves no word: then the first that missed it is named.

    A job of several processes ends at most ``exit_after`` seconds after an error: cleaning up may wait for a device
    that waits for the rank that failed.

    Comes first among the callbacks, so that none that fails after the error hides it.

    Args:
        exit_after: Seconds.
    """

    def __init__(self, exit_after: float = 60.0) -> None:
        self.exit_after = exit_after
        self.sentence: str | None = None
        self.is_consequence = False
        self._start = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Tells the errors of this start of the job from those of earlier ones, on machines whose clocks differ.
        self._start = trainer.strategy.broadcast(uuid.uuid4().hex)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Exception):
            return  # a signal, or an exit that somebody asked for
        if trainer.world_size > 1:
            _exit_after(self.exit_after)
        elif isinstance(exception, (ValueError, OSError)):
            return  # a mistake that users are told in one sentence
        own = _sentence(trainer, exception)
        folder = Path(trainer.default_root_dir) / "errors"
        try:
            self.sentence = _first_in_store(own)
        except (RuntimeError, OSError):
            self.sentence = self._first_in_files(folder) or own
        self.is_consequence = self.sentence != own
        self._write(folder / f"rank{trainer.global_rank:03d}.txt", exception)

    def _write(self, path: Path, exception: Exception) -> None:
        now = datetime.now(timezone.utc)
        head = f"start {self._start}, {now:%Y-%m-%d %H:%M:%S} UTC, process {os.getpid()}\nfirst: {self.sentence}\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:  # a launcher may start the job again: the earlier error is of interest too
                file.write(head + "".join(traceback.format_exception(exception)) + "\n")
        except OSError:
            pass  # a full disk may be the very error

    def _first_in_files(self, folder: Path) -> str | None:
        """What ranks that have failed in this start of the job call the first error."""
        for path in sorted(folder.glob("rank*.txt")):
            found = re.search(rf"^start {self._start},.*\nfirst: (.*)$", path.read_text(), re.MULTILINE)
            if self._start and found:
                return found[1]
        return None


def _sentence(trainer: Trainer, exception: Exception) -> str:
    reason = (str(exception).strip().splitlines() or [""])[0]
    sentence = (
        f"rank {trainer.global_rank} on {socket.gethostname()} failed first, at step {trainer.global_step}: "
        f"{type(exception).__name__}: {reason}"
    )
    if trainer.world_size > 1 and any(sign in str(exception) for sign in _LOST_PEER):
        sentence += (
            "; it lost another rank, which left no error of its own and may have been killed: look at what the "
            "launcher says, and for memory or nodes that ran out"
        )
    return sentence


def _first_in_store(sentence: str) -> str:
    """The sentence of the rank that came here first in this start of the job.

    Raises:
        RuntimeError: the process that keeps the store, rank 0 unless torchrun does, is gone.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sentence
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    return torch.distributed.PrefixStore("flexidit", store).compare_set("first error", "", sentence).decode()


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
