"""No byte of a file can change without being noticed, or it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexidit.weight_files import load_pickle
from flexidit.zip_records import check_records

VALUES: dict[str, Any] = {"a": torch.arange(5.0), "b": [1, 2, {"c": torch.arange(3)}], "d": "text"}


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    torch.save(VALUES, tmp_path / "whole.pt")
    check_records(tmp_path / "whole.pt")
    return (tmp_path / "whole.pt").read_bytes()


def is_same(read: Any) -> bool:
    one, other = read["a"], read["b"][2]["c"]
    rest = {**read, "a": None, "b": read["b"][:2]}
    tensors = torch.equal(one, VALUES["a"]) and torch.equal(other, VALUES["b"][2]["c"])
    return tensors and rest == {**VALUES, "a": None, "b": [1, 2]}


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path, written: bytes) -> None:
    """Most of so small a file is padding, which nothing reads."""
    path, noticed = tmp_path / "flipped.pt", []
    for position in range(len(written)):
        flipped = bytearray(written)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            read = load_pickle(path)
        except ValueError as error:
            noticed.append(str(error))
        else:
            assert is_same(read), position
    assert len(noticed) > 400
    assert all("flipped.pt" in sentence for sentence in noticed)


def test_a_flipped_bit_of_a_tensor_is_noticed_and_torch_would_not(tmp_path: Path, written: bytes) -> None:
    content = VALUES["a"].numpy().tobytes()
    start = written.index(content)
    path = tmp_path / "flipped.pt"
    for position in range(start, start + len(content)):
        path.write_bytes(written[:position] + bytes([written[position] ^ 1]) + written[position + 1 :])
        assert not is_same(torch.load(path, weights_only=True))
        with pytest.raises(ValueError, match=r"flipped\.pt is damaged \(its part archive/data/0|whole/data/0"):
            check_records(path)


def test_a_file_that_is_cut_short_anywhere_is_noticed(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "cut.pt"
    for length in range(0, len(written), 7):
        path.write_bytes(written[:length])
        with pytest.raises(ValueError, match=r"cut\.pt is (damaged|not a checkpoint)"):
            load_pickle(path)


def test_many_records_are_compared_too(tmp_path: Path) -> None:
    path = tmp_path / "many.pt"
    torch.save([torch.full((10,), float(number)) for number in range(50)], path)
    check_records(path)
    last = torch.full((10,), 49.0).numpy().tobytes()
    content = path.read_bytes()
    path.write_bytes(content.replace(last, last[:-1] + b"\x01"))
    with pytest.raises(ValueError, match="data/49 is not what was written"):
        check_records(path)
