"""A copy is what was there at the call, whatever becomes of it."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.snapshots import Snapshots


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_is_of_the_moment_of_the_call(device: str) -> None:
    snapshots = Snapshots()
    for number in range(3):  # the second and third in the memory of the first
        state = {"a": [torch.randn(1 << 24, device=device), number], "b": torch.randn(3, 5, device=device)}
        expected = {"a": [state["a"][0].cpu().clone(), number], "b": state["b"].cpu().clone()}
        copied = snapshots.take(state)
        state["a"][0].zero_()
        state["b"].zero_()
        assert torch.equal(copied["a"][0], expected["a"][0])
        assert torch.equal(copied["b"], expected["b"])
        assert copied["a"][1] == number
        assert copied["b"].device.type == "cpu"
        assert copied["b"].is_pinned() is (device == "cuda")


def test_what_is_there_twice_is_copied_once() -> None:
    one = torch.ones(3)
    copied = Snapshots().take([one, {"again": one}])
    assert copied[0] is copied[1]["again"]
    assert copied[0] is not one
