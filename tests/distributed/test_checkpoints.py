"""Saving and loading by several processes together: what one finds, all do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flexidit import load_checkpoint
from flexidit.cli import main
from flexidit.sharded_files import check_sharded, describe_sharded, read_sharded
from flexidit.weight_files import load_pickle
from lightning_modules.checkpoint_files import UNFINISHED, recover
from tests.distributed.checkpoint_cases import STEPS, names, results_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_cases: Callable[..., Path]) -> Path:
    return run_cases("checkpoint_cases", tmp_path_factory.mktemp("checkpoints"))


def test_a_full_disk_of_rank_0_is_a_warning_and_all_ranks_go_on(folder: Path) -> None:
    first, second = results_of(folder, "full_disk")
    assert first["step"] == second["step"] == STEPS
    assert first["error"] == second["error"] == ""
    assert len(first["warnings"]) == 1
    assert "step=2.ckpt could not be saved (No space left on device)" in first["warnings"][0]
    assert second["warnings"] == []
    assert names(folder / "full_disk") == ["step=3.ckpt"]


def test_a_job_that_could_not_save_once_ends_in_the_same_error_on_all_ranks(folder: Path) -> None:
    first, second = results_of(folder, "never")
    assert first["error"] == second["error"]
    assert f"not one of this run's {STEPS} checkpoints could be saved (No space left on device)" in first["error"]


def test_a_link_that_rank_0_cannot_make_is_a_warning_and_all_ranks_go_on(folder: Path) -> None:
    first, second = results_of(folder, "no_link")
    assert first["step"] == second["step"] == STEPS
    assert first["error"] == second["error"] == ""
    assert len(first["warnings"]) == 1 and second["warnings"] == []
    assert "last.ckpt could not be made to point to" in first["warnings"][0]
    assert (folder / "no_link" / "last.ckpt").readlink() == Path(f"step={STEPS}.ckpt")


def test_all_ranks_go_on_from_the_one_that_rank_0_chose(folder: Path) -> None:
    first, second = results_of(folder, "newest")
    assert first["path"] == second["path"] == str(folder / "several" / "step=2.ckpt")
    assert first["step"] == second["step"] == STEPS + 1
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


def test_ranks_of_which_some_see_no_checkpoint_end_in_one_sentence(folder: Path) -> None:
    first, second = results_of(folder, "disagree")
    assert first["error"] == second["error"]
    assert "some processes of this job see a checkpoint to go on from and others see none" in first["error"]


def test_a_sharded_checkpoint_is_a_whole_folder_and_its_model_can_be_had(folder: Path) -> None:
    last = folder / "shards" / "last.ckpt"
    check_sharded(last)
    assert names(last) == [".metadata", "__0_0.distcp", "__1_0.distcp", "complete.json", "meta.pt"]
    assert UNFINISHED not in names(folder / "shards")
    trained = results_of(folder, "shards")[0]["weights"]
    raw = load_checkpoint(last, prefer_ema=False).state_dict()
    for name, value in raw.items():
        assert torch.equal(value, trained[f"model.{name}"])
    assert load_pickle(last / "meta.pt")["callbacks"]["EMA"]["average"] == {}  # no process has all of it
    average = read_sharded(last)["callbacks"]["EMA"]["average"]
    for name, value in load_checkpoint(last).named_parameters():
        expected = average.get(f"model.{name}", raw[name])
        assert torch.equal(value, expected)
    assert not torch.equal(average["model.blocks.0.attn.qkv.weight"], raw["blocks.0.attn.qkv.weight"])
    described = describe_sharded(last)["callbacks"]["EMA"]["average"]
    assert {name: value.shape for name, value in described.items()} == {name: v.shape for name, v in average.items()}


def test_a_sharded_checkpoint_becomes_one_file(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "one.safetensors"
    assert main(["convert", str(folder / "shards" / "last.ckpt"), str(output), "--to", "flexidit"]) == 0
    one, other = load_checkpoint(output).state_dict(), load_checkpoint(folder / "shards" / "last.ckpt").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "meta.pt"])
def test_a_sharded_checkpoint_that_lacks_a_file_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    copied = tmp_path / "last.ckpt"
    shutil.copytree(folder / "shards" / "last.ckpt", copied)
    (copied / name).unlink()
    for check in (check_sharded, load_checkpoint):
        with pytest.raises(ValueError, match=rf"last\.ckpt is not whole: it has no {name}"):
            check(copied)


def test_one_that_plain_lightning_wrote_is_checked_by_what_it_lists(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "last.ckpt"
    shutil.copytree(folder / "shards" / "last.ckpt", copied)
    (copied / "complete.json").unlink()
    check_sharded(copied)
    (copied / "__1_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is not whole: it has no __1_0\.distcp"):
        check_sharded(copied)


def test_a_flipped_bit_of_a_shard_is_noticed(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "last.ckpt"
    shutil.copytree(folder / "shards" / "last.ckpt", copied)
    shard = copied / "__1_0.distcp"
    weight = load_checkpoint(copied, prefer_ema=False).blocks[1].mlp.fc1.weight
    content = shard.read_bytes()
    position = content.index(weight.chunk(2)[1].detach().numpy().tobytes())  # the second process's rows
    shard.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    with pytest.raises(ValueError, match=r"__1_0\.distcp is damaged \(its part state_dict\.model\.blocks\.1\.mlp\.fc1"):
        load_checkpoint(copied)


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_a_sharded_checkpoint_with_code_in_it_is_refused(
    folder: Path, tmp_path: Path, hostile: Callable[..., Path], name: str
) -> None:
    copied = tmp_path / "last.ckpt"
    shutil.copytree(folder / "shards" / "last.ckpt", copied)
    (copied / "complete.json").unlink()
    hostile(copied / name, is_zip=name == "meta.pt")
    for check in (check_sharded, load_checkpoint):
        with pytest.raises(ValueError, match=f"{name} holds objects that only running its code could rebuild"):
            check(copied)
    assert not (copied / "was_run").exists()


def test_one_process_that_cannot_write_its_shard_costs_that_checkpoint_only(folder: Path) -> None:
    first, second = results_of(folder, "full_disk_of_one")
    assert first["step"] == second["step"] == STEPS
    assert len(first["warnings"]) == 1
    assert "step=2.ckpt could not be saved" in first["warnings"][0]
    assert names(folder / "full_disk_of_one") == ["step=3.ckpt"]
    check_sharded(folder / "full_disk_of_one" / "step=3.ckpt")


def test_a_kill_in_a_sharded_save_leaves_the_one_before(folder: Path) -> None:
    killed = folder / "killed"
    assert not (folder / "killed_0_of_2.pt").exists()
    check_sharded(killed / "last.ckpt")
    assert load_pickle(killed / "last.ckpt" / "meta.pt")["global_step"] == 1
    assert recover(killed) == ["last.ckpt"]
    assert names(killed) == ["last.ckpt"]


def test_after_a_kill_in_a_save_the_job_goes_on_and_nothing_of_it_is_left(folder: Path) -> None:
    assert not (folder / "killed_in_file_0_of_2.pt").exists()
    first, second = results_of(folder, "restarted")
    whole = results_of(folder, "several")
    assert first["step"] == second["step"] == STEPS
    for rank, other in zip((first, second), whole, strict=True):
        assert rank["losses"] == other["losses"][1:]  # the first step is in the checkpoint
    assert names(folder / "killed_in_file") == ["last.ckpt"]


@pytest.mark.parametrize("name, world_size", [("resume", 1), ("resume", 4), ("resume_unsharded", 1)])
def test_any_number_of_ranks_goes_on_from_a_sharded_checkpoint(folder: Path, name: str, world_size: int) -> None:
    resumed, whole = results_of(folder, name, world_size), results_of(folder, "shards")
    assert all(rank["error"] == "" and rank["step"] == STEPS for rank in resumed)
    loss = sum(rank["losses"][-1] for rank in resumed) / world_size
    assert loss == pytest.approx(sum(rank["losses"][-1] for rank in whole) / 2, rel=1e-4)
    own = "resumed_unsharded" if name == "resume_unsharded" else f"resumed_{world_size}"
    paths = (folder / own / "last.ckpt", folder / "shards" / "last.ckpt")
    ours, theirs = (load_checkpoint(path).state_dict() for path in paths)  # the average
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-3)
