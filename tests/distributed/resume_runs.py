"""Runs of the cases of ``resume_cases`` that are killed and resumed, and where they differ from those that are not."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed.processes import Ranks
from tests.distributed.resume_cases import Case, train


@dataclass(frozen=True)
class Kill:
    """What a killed run had done, and what of it is lost."""

    steps: int
    """Steps that its ledger has; the last one may be incomplete."""
    saved: int
    """Step of the checkpoint that it left; 0: none."""

    @property
    def lost(self) -> int:
        """Steps that have to be done again."""
        return self.steps - self.saved


class Runs:
    """Whole and interrupted runs of cases.

    Args:
        context: of ``fork_server``.
        folder: for inputs and runs.
        timeout: of a run, in seconds.
    """

    def __init__(self, context: Any, folder: Path, timeout: float = 120) -> None:
        self.context, self.folder, self.timeout = context, folder, timeout
        self.inputs = folder / "inputs"

    def start(self, case: Case, folder: Path) -> Ranks:
        """The processes of a run, or of the resume of one that was killed in this folder."""
        folder.mkdir(parents=True, exist_ok=True)
        return Ranks(self.context, train, (case, self.inputs, folder), case.processes, folder)

    def finish(self, case: Case, folder: Path) -> Path:
        """Run to the end."""
        with self.start(case, folder) as ranks:
            ranks.finish(self.timeout)
        return folder

    def whole(self, case: Case) -> Path:
        """The folder of the run that nobody kills; it is run once."""
        folder = self.folder / "whole" / case.name
        return folder if (folder / "done").exists() else self._whole(case, folder)

    def _whole(self, case: Case, folder: Path) -> Path:
        self.finish(case, folder)
        (folder / "done").touch()
        return folder

    def kill_once(self, case: Case, folder: Path, rng: random.Random) -> Kill | None:
        """Start or resume, and ``kill -9`` at a random moment; None if the run was faster.

        The moment is a random time after a random micro-batch of this start, the zeroth included: while processes
        start, load, compute, validate or write.
        """
        before = len(entries(folder, 0))
        batches = rng.randrange(0, max(1, case.steps * case.accumulate - before))
        with self.start(case, folder) as ranks:
            while ranks.is_running and (not batches or len(entries(folder, 0)) < before + batches):
                time.sleep(0.002)
                if not batches:
                    break
            time.sleep(rng.uniform(0, 0.05 if batches else 2.0))
            was_running = ranks.is_running
            ranks.kill()
        if not was_running:
            return None
        steps = max((entry["step"] + 1 for rank in range(case.processes) for entry in entries(folder, rank)), default=0)
        return Kill(steps, saved_step(folder))


def entries(folder: Path, rank: int) -> list[dict[str, Any]]:
    """The ledger of a rank; a line that a kill cut in two is left out."""
    path = folder / f"ledger{rank}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def saved_step(folder: Path) -> int:
    """Step of the checkpoint that a run left; 0: none."""
    path = folder / "last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0


def run_differences(case: Case, whole: Path, other: Path) -> list[str]:
    """Where an interrupted run is not the whole one, to the last bit: losses of all ranks, and all that is saved."""
    found: list[str] = []
    for rank in range(case.processes):
        expected = {(e["step"], e["batch"]): e["loss"] for e in entries(whole, rank)}
        got = entries(other, rank)
        wrong = [e for e in got if expected.get((e["step"], e["batch"])) != e["loss"]]
        found += [f"rank {rank}: loss of step {e['step']}, micro-batch {e['batch']}" for e in wrong]
        if {(e["step"], e["batch"]) for e in got} != expected.keys():
            found.append(f"rank {rank}: other steps were taken")
    one, two = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (whole, other))
    return found + [f"checkpoint: {name}" for name in state_differences(_compared(one), _compared(two))]


def _compared(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """All but what Lightning counts for itself, and where a file is."""
    left_out = ("loops", "callbacks")
    return {**{k: v for k, v in checkpoint.items() if k not in left_out}, "EMA": checkpoint["callbacks"]["EMA"]}


def state_differences(one: Any, two: Any, name: str = "") -> Iterator[str]:
    """Names of the leaves of nested states that are not equal, bit for bit."""
    if isinstance(one, Mapping) and isinstance(two, Mapping) and one.keys() == two.keys():
        for key in one:
            yield from state_differences(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for number, pair in enumerate(zip(one, two, strict=True)):
            yield from state_differences(*pair, f"{name}.{number}")
    elif isinstance(one, Tensor) and isinstance(two, Tensor):
        if not torch.equal(one, two):
            yield name
    elif one != two:
        yield name
