from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from flexidit import create_model, flexify
from flexidit.lora import adapted_layers, merged_copy
from flexidit.models.dit import DiT

Randomise = Callable[..., nn.Module]


@pytest.fixture
def student(randomised: Randomise) -> DiT:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    randomised(model)
    student = flexify(model, [4, 8], recipe="lora", rank=4, alpha=6.0)
    randomised(student, seed=1)
    return student.eval()


@pytest.mark.parametrize("patch_size", [4, 8])
def test_merged_equals_unmerged(student: DiT, patch_size: int) -> None:
    merged = merged_copy(student, patch_size)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 9])
    torch.testing.assert_close(
        merged(x, t, y, patch_size=patch_size), student(x, t, y, patch_size=patch_size), atol=1e-5, rtol=1e-5
    )
    plain = create_model("DiT-Tiny/2", patch_size=patch_size, input_size=8, num_classes=10)
    assert set(merged.state_dict()) == set(plain.state_dict())


def test_merging_leaves_the_student_alone(student: DiT) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    merged_copy(student, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_our_forward_is_that_of_peft(student: DiT) -> None:
    """peft's own forward, its adapter switched by peft, gives what our stateless one gives."""
    from flexidit.layers import adapted_linear
    from flexidit.patch_size import PatchSize

    x = torch.randn(3, 5, 64)
    for layer in adapted_layers(student)[:2]:
        for name in ("1x4x4", "1x8x8"):
            layer.set_adapter(name)
            torch.testing.assert_close(adapted_linear(layer, x, PatchSize.parse(name)), layer(x))


def test_what_cannot_be_merged_is_refused(student: DiT) -> None:
    with pytest.raises(ValueError, match="no adapter to merge"):
        merged_copy(student, 2)
    with pytest.raises(ValueError, match="at least 1"):
        flexify(create_model("DiT-Tiny/2", input_size=8), [4], recipe="lora", rank=0)
