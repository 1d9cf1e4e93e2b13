"""Kills training runs at random moments, resumes them, and compares them with runs that nobody killed.

    python benchmarks/soak.py --kills 30 --seed 0 --json soak.json      (make soak)

The three training modules on all their kinds of data, 1 and 2 processes on the CPU. A run is killed (``kill -9`` of
all its processes) and resumed some times, each time from the newest checkpoint; then it runs to its end and must be the
whole run, to the last bit: losses of all steps and ranks, weights, average, moments, generators. Expected: some minutes
on two cores, and zero differences. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.processes import Ranks, fork_server

KILLS_A_RUN = 2


@dataclass
class Row:
    """One interrupted run."""

    case: str
    kills: int = 0
    resumes: int = 0
    lost_steps: int = 0
    differences: int = 0
    seconds: float = 0.0
    first_difference: str = ""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    context = fork_server()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        rows = list(soak(context, Path(args.folder or folder), args.kills, args.seed, args.steps))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.differences for row in rows) or sum(row.kills for row in rows) < args.kills)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills altogether")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; when a process is killed also depends on "
                        "how fast the machine is")  # fmt: skip
    parser.add_argument("--steps", type=int, default=60, help="of a run; it is saved at every second one")
    parser.add_argument("--folder", help="for the runs, which are kept; default: a temporary one")
    parser.add_argument("--json", help="file for the table")
    args = parser.parse_args(argv)
    if args.kills < 1 or args.steps < 2 or args.steps % 2:
        parser.error(f"--kills is at least 1 and --steps an even number, got {args.kills} and {args.steps}")
    return args


def soak(context: object, folder: Path, kills: int, seed: int, steps: int) -> Iterator[Row]:
    """One interrupted run after another, until there were as many kills; prints the table as it grows."""
    from tests.distributed.resume_cases import CASES, prepare
    from tests.distributed.resume_runs import Runs

    runs, start, rng = Runs(context, folder, timeout=600), time.monotonic(), random.Random(seed)
    runs.inputs.mkdir(parents=True, exist_ok=True)
    with Ranks(context, prepare, (runs.inputs,), 1, folder) as ranks:
        ranks.finish(runs.timeout)
    print(line("run", "kills", "resumes", "lost steps", "differences", "seconds", "left"), flush=True)
    total = Row("all")
    for number in range(100 * kills):
        if total.kills >= kills:
            break
        case = replace(CASES[number % len(CASES)], steps=steps)
        row = interrupted(runs, case, folder / f"run{number}", rng, min(KILLS_A_RUN, kills - total.kills))
        add(total, row)
        total.seconds = time.monotonic() - start
        left = total.seconds / max(1, total.kills) * (kills - total.kills)
        print(line(case.name, *numbers(row), f"{left / 60:.1f} min"), flush=True)
        if row.differences:
            print(f"    {row.first_difference}", flush=True)
        yield row
    print(line("all", *numbers(total), ""), flush=True)


def interrupted(runs: object, case: object, folder: Path, rng: random.Random, kills: int) -> Row:
    """Kill and resume a run some times, let it end, compare."""
    from tests.distributed.resume_cases import Case
    from tests.distributed.resume_runs import Runs, run_differences

    assert isinstance(runs, Runs) and isinstance(case, Case)
    start, row = time.monotonic(), Row(case.name)
    whole = runs.whole(case)
    for _ in range(kills):
        kill = runs.kill_once(case, folder, rng)
        if kill is None:
            break  # the run was faster
        row.kills, row.lost_steps = row.kills + 1, row.lost_steps + kill.lost
        row.resumes += kill.saved > 0
    runs.finish(case, folder)
    found = run_differences(case, whole, folder)
    row.differences, row.first_difference = len(found), next(iter(found), "")
    row.seconds = time.monotonic() - start
    return row


def add(total: Row, row: Row) -> None:
    for name in ("kills", "resumes", "lost_steps", "differences"):
        setattr(total, name, getattr(total, name) + getattr(row, name))


def numbers(row: Row) -> tuple[str, ...]:
    return (*map(str, (row.kills, row.resumes, row.lost_steps, row.differences)), f"{row.seconds:.0f}")


def line(name: str, *cells: str) -> str:
    return f"{name:<52}" + "".join(f"{cell:>13}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
