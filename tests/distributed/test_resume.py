"""Runs that are killed with ``kill -9`` at random moments and resumed are the runs that nobody killed, bit for bit.

All three training modules, on all kinds of data, with real processes. ``make soak`` does the same for a quarter of an
hour; here each case is killed twice, at moments that differ from run to run of the tests.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import Ranks, fork_server
from tests.distributed.resume_cases import CASES, CUDA_CASES, STEPS, Case, prepare
from tests.distributed.resume_runs import Runs, entries, run_differences, saved_step, state_differences


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(fork_server(), tmp_path_factory.mktemp("resume"))
    runs.inputs.mkdir()
    with Ranks(runs.context, prepare, (runs.inputs,), 1, runs.folder) as ranks:
        ranks.finish(runs.timeout)
    return runs


ON_CUDA = [pytest.param(case, marks=pytest.mark.gpu) for case in CUDA_CASES]


@pytest.mark.parametrize("case", [*CASES, *ON_CUDA], ids=lambda case: case.name)
def test_a_killed_and_resumed_run_is_the_whole_one_bit_for_bit(runs: Runs, tmp_path: Path, case: Case) -> None:
    whole, rng = runs.whole(case), random.Random()
    folder = tmp_path / "killed"
    kills = [kill for kill in (runs.kill_once(case, folder, rng) for _ in range(2)) if kill is not None]
    runs.finish(case, folder)
    assert saved_step(folder) == STEPS
    assert run_differences(case, whole, folder) == [], kills
    assert all(0 <= kill.lost <= 3 for kill in kills)  # saved every two steps; the last entry may be of a begun step


def test_the_whole_runs_have_what_a_resume_must_bring_back(runs: Runs) -> None:
    """Several epochs, one of which is under way at most checkpoints; all patch sizes; losses that differ by rank."""
    for case in CASES:
        ledger = entries(runs.whole(case), 0)
        assert {entry["step"] for entry in ledger} == set(range(STEPS))
        epochs = sum(entry["batch"] == 0 for entry in ledger)
        assert 2 <= epochs <= 4
        if case.processes > 1:
            assert [entry["loss"] for entry in entries(runs.whole(case), 1)] != [entry["loss"] for entry in ledger]


def stopped(runs: Runs, case: Case, folder: Path) -> Path:
    """A run that was killed in its second half, with a checkpoint."""
    with runs.start(case, folder) as ranks:
        while ranks.is_running and saved_step(folder) < STEPS // 2:
            pass
    assert STEPS // 2 <= saved_step(folder) <= STEPS
    return folder / "last.ckpt"


def without_generators(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["flexidit"]["generators"] = []
    torch.save(checkpoint, path)


def test_the_generators_in_the_checkpoint_matter(runs: Runs, tmp_path: Path) -> None:
    """A callback that draws from them makes other losses without them, and it is said."""
    case = next(case for case in CASES if case.draws and case.processes == 1)
    without_generators(stopped(runs, case, tmp_path))
    runs.finish(case, tmp_path)
    assert any("loss of step" in name for name in run_differences(case, runs.whole(case), tmp_path))
    assert "the global random generators start anew" in (tmp_path / "output_rank0.txt").read_text()


def test_what_the_modules_draw_themselves_needs_no_generators(runs: Runs, tmp_path: Path) -> None:
    case = Case("class digits", processes=2, accumulate=2)
    without_generators(stopped(runs, case, tmp_path / "run"))
    runs.finish(case, tmp_path / "run")
    found = run_differences(case, runs.whole(case), tmp_path / "run")
    assert [name for name in found if ".generators." not in name] == []


def test_a_checkpoint_has_the_generators_of_each_rank(runs: Runs) -> None:
    case = next(case for case in CASES if case.draws and case.processes == 2)
    first, second = torch.load(runs.whole(case) / "last.ckpt", weights_only=True)["flexidit"]["generators"]
    for name in ("python", "numpy", "torch"):
        assert list(state_differences(first[name], second[name]))
