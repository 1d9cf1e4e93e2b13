"""Look-ups by step index."""

from __future__ import annotations

import pickle

import pytest
import torch

from flexidit.diffusion.tables import StepTables

TABLES = StepTables({"a": torch.arange(5).double() / 3, "b": -torch.arange(5).double()})


def test_values_keep_their_precision_until_they_are_used() -> None:
    t = torch.tensor([4, 0, 1])
    assert torch.equal(TABLES.lookup("a", t), t.double() / 3)
    half = TABLES.coefficient("a", t, torch.zeros(3, 2, 2, dtype=torch.bfloat16))
    assert half.dtype == torch.float32 and half.shape == (3, 1, 1)
    assert TABLES.coefficient("b", t, torch.zeros(3, 2, dtype=torch.float64)).flatten().tolist() == [-4, 0, -1]


def test_copies_on_devices_are_not_pickled() -> None:
    TABLES.lookup("a", torch.tensor([1]))
    loaded = pickle.loads(pickle.dumps(TABLES))
    assert torch.equal(loaded.lookup("b", torch.tensor([3])), TABLES.lookup("b", torch.tensor([3])))
    assert len(pickle.dumps(TABLES)) == len(pickle.dumps(StepTables(dict(zip("ab", TABLES._tables, strict=True)))))


@pytest.mark.parametrize("t", [torch.tensor([1]), torch.tensor([0.5, 1.0]), torch.tensor(1)])
def test_anything_but_an_index_a_sample_is_refused(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one integer step index for each of the 2 samples"):
        TABLES.coefficient("a", t, torch.zeros(2, 3))
