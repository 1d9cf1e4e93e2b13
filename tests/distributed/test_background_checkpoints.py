"""Shards that are written while training goes on: the same as at once, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.preemption import PREEMPTED
from flexidit.sharded_files import check_sharded, read_sharded
from flexidit.weight_files import load_pickle
from lightning_modules.checkpoint_files import recover
from tests.distributed.background_cases import FAILING_STEPS
from tests.distributed.checkpoint_cases import STEPS, names, results_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_cases: Callable[..., Path]) -> Path:
    return run_cases("background_cases", tmp_path_factory.mktemp("background"))


def assert_same(one: Any, other: Any) -> None:
    """Containers, tensors and plain values, to the bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for value, counterpart in zip(one, other, strict=True):
            assert_same(value, counterpart)
    else:
        assert one == other


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_folder_is_that_of_a_save_at_once_though_training_goes_on(folder: Path, step: int) -> None:
    assert_folders_are_the_same(*(folder / run / f"step={step}.ckpt" for run in ("at_once", "overtaken")), step)


@pytest.mark.gpu
def test_on_a_gpu_as_well(tmp_path: Path, run_cases: Callable[..., Path]) -> None:
    run_cases("cuda_cases", tmp_path)
    [result] = results_of(tmp_path, "overtaken", 1)
    assert (result["error"], result["step"]) == ("", STEPS)
    for step in range(1, STEPS + 1):
        assert_folders_are_the_same(*(tmp_path / run / f"step={step}.ckpt" for run in ("at_once", "overtaken")), step)


def assert_folders_are_the_same(one: Path, other: Path, step: int) -> None:
    at_once, overtaken = ({**read_sharded(path, with_optimizers=True)} for path in (one, other))
    check_sharded(other)
    assert names(one) == names(other)
    for written in (at_once, overtaken):
        saver = next(name for name in written["callbacks"] if name.startswith("ModelCheckpoint"))
        del written["callbacks"][saver]  # it names the run's folder
        del written["loops"]  # seconds
    assert_same(at_once, overtaken)
    assert at_once["optimizer_states"][0]["state"][0]["step"] == step


def test_training_does_not_notice(folder: Path) -> None:
    assert_same([rank["losses"] for rank in results_of(folder, "at_once")],
                [rank["losses"] for rank in results_of(folder, "overtaken")])  # fmt: skip


def test_shards_that_two_processes_have_are_written_once(folder: Path) -> None:
    """HSDP: what is on disk is what was trained."""
    trained = results_of(folder, "copied", 4)[0]["weights"]
    path = folder / "copied" / f"step={STEPS}.ckpt"
    check_sharded(path)
    assert_same(read_sharded(path)["state_dict"], trained)
    size = sum(tensor.nbytes for tensor in trained.values())
    assert sum(file.stat().st_size for file in path.glob("*.distcp")) < 2 * 4 * size  # average, two moments, headers


def test_what_goes_on_from_shards_is_the_same_run(folder: Path) -> None:
    last = f"step={STEPS}.ckpt"
    for whole, resumed in ((folder / "at_once" / last, folder / "killed" / "last.ckpt"),
                           (folder / "copied" / last, folder / "copied_on" / last)):  # fmt: skip
        one, other = (read_sharded(path, with_optimizers=True) for path in (whole, resumed))
        assert_same(one["state_dict"], other["state_dict"])
        assert_same(one["optimizer_states"], other["optimizer_states"])
        assert one["callbacks"]["EMA"]["average"]
        assert_same(one["callbacks"]["EMA"], other["callbacks"]["EMA"])


def test_whatever_one_process_cannot_write_is_a_warning_and_nothing_is_removed_before_a_save_succeeds(
    folder: Path,
) -> None:
    first, second = results_of(folder, "failing")
    assert first["step"] == second["step"] == FAILING_STEPS
    assert first["error"] == second["error"] == ""
    assert second["warnings"] == []
    for step, reason in ((2, "No space left on device"), (3, "No space left on device"), (4, "Permission denied")):
        said = next(text for text in first["warnings"] if f"step={step}.ckpt could not be saved" in text)
        assert f"failing/step={step}.ckpt could not be saved ({reason})" in said
    assert len(first["warnings"]) == 3
    removed = [(name, there) for name, there in first["removed"] if name in there]  # others never were
    assert removed == [("step=1.ckpt", ["step=1.ckpt", f"step={FAILING_STEPS}.ckpt"])]
    assert second["removed"] == []
    assert names(folder / "failing") == [f"step={FAILING_STEPS}.ckpt"]
    check_sharded(folder / "failing" / f"step={FAILING_STEPS}.ckpt")


def test_a_job_that_could_not_save_once_ends_in_the_same_error_on_all_ranks(folder: Path) -> None:
    first, second = results_of(folder, "hopeless")
    assert first["error"] == second["error"]
    assert f"not one of this run's {STEPS} checkpoints could be saved (No space left on device)" in first["error"]
    assert len(first["warnings"]) == STEPS


def test_a_kill_between_the_call_and_its_end_leaves_the_one_before_and_the_job_goes_on_from_it(folder: Path) -> None:
    assert not (folder / "killed_in_shards_0_of_2.pt").exists()
    whole, restarted = results_of(folder, "at_once"), results_of(folder, "restarted")
    for rank, other in zip(restarted, whole, strict=True):
        assert rank["step"] == STEPS
        assert rank["losses"] == other["losses"][1:]  # the first step is in the checkpoint
        assert_same(rank["weights"], other["weights"])
    assert names(folder / "killed") == ["last.ckpt"]


def test_a_kill_before_a_whole_one_has_its_name_leaves_the_one_before(folder: Path) -> None:
    assert not (folder / "killed_in_naming_0_of_2.pt").exists()
    check_sharded(folder / "unnamed" / "last.ckpt")
    assert load_pickle(folder / "unnamed" / "last.ckpt" / "meta.pt")["global_step"] == 1
    assert recover(folder / "unnamed") == ["last.ckpt"]
    assert names(folder / "unnamed") == ["last.ckpt"]


def test_a_preempted_job_leaves_when_its_checkpoint_is_there(folder: Path) -> None:
    first, _ = results_of(folder, "preempted")
    assert first == {"code": PREEMPTED, "names": ["last.ckpt"]}
    check_sharded(folder / "preempted" / "last.ckpt")
    assert load_pickle(folder / "preempted" / "last.ckpt" / "meta.pt")["global_step"] == 2
