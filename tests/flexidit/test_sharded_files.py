"""A folder of shards is read without running anything in it, and every byte of it counts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from flexidit.sharded_files import check_sharded, describe_sharded, is_sharded, mark_complete, read_sharded

WEIGHTS = {"model.a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(3, dtype=torch.bfloat16)}


class Counter:
    """Not a tensor and not plain data."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What one process writes."""
    return write(tmp_path / "last.ckpt", 0.1)


def write(folder: Path, lr: Any) -> Path:
    optimizer = {"state": {"model.a": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": lr}]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"state_dict": WEIGHTS, "optimizer_0": optimizer}, checkpoint_id=folder)
    torch.save({"global_step": 3}, folder / "meta.pt")
    mark_complete(folder)
    return folder


def test_what_was_written_is_read_without_the_optimizer(folder: Path) -> None:
    assert is_sharded(folder)
    assert not is_sharded(folder.parent)
    check_sharded(folder)
    read = read_sharded(folder)
    assert read["global_step"] == 3
    assert read.keys() == {"global_step", "state_dict"}
    assert read["state_dict"].keys() == WEIGHTS.keys()
    assert all(torch.equal(value, read["state_dict"][name]) for name, value in WEIGHTS.items())
    described = describe_sharded(folder)
    assert {name: value.shape for name, value in described["state_dict"].items()} == {
        name: value.shape for name, value in WEIGHTS.items()
    }
    assert "optimizer_states" in described


def test_a_change_of_any_file_is_noticed_or_changes_nothing(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        content, noticed = path.read_bytes(), 0
        for position in range(0, len(content), 11):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            try:
                check_sharded(folder)
                read = read_sharded(folder)
            except ValueError:
                noticed += 1
            else:
                assert all(torch.equal(value, read["state_dict"][name]) for name, value in WEIGHTS.items())
        assert noticed > 0, path.name
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"last\.ckpt"):
            check_sharded(folder)
        path.write_bytes(content)
    check_sharded(folder)


def test_an_object_among_the_optimizer_s_numbers_is_refused(tmp_path: Path) -> None:
    """torch would unpickle it with all that pickle can do."""
    with pytest.raises(ValueError, match=r"__0_0\.distcp holds objects that only running its code could rebuild"):
        check_sharded(write(tmp_path / "hostile.ckpt", Counter()))
