"""A student with one more size: the old sizes as they were, the new one as ``flexify`` starts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexidit import create_model, flexify
from flexidit.extension import extend
from flexidit.models import FlexiTransformer

RECIPES: dict[str, dict[str, Any]] = {
    "shared": {"recipe": "shared", "underlying_patch_size": 8},
    "without norms": {"recipe": "shared", "size_norms": False, "underlying_patch_size": 8},
    "lora": {"recipe": "lora", "rank": 4, "positions": "grid"},
}


@pytest.fixture
def target(randomised: Callable[..., nn.Module]) -> FlexiTransformer:
    sizes = {"input_size": 8, "in_channels": 1, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 10}
    return randomised(create_model("DiT-Tiny/2", **sizes)).eval()  # type: ignore[return-value]


def predict(model: FlexiTransformer, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    return model(x, torch.tensor([3, 500]), torch.tensor([1, 2]), patch_size=size)


@pytest.mark.parametrize("old, new", [((4,), (4, 8)), ((8,), (4, 8)), ((8,), (4,))])
@pytest.mark.parametrize("recipe", RECIPES)
def test_old_sizes_stay_and_new_ones_start_as_flexify_starts_them(
    target: FlexiTransformer, randomised: Callable[..., nn.Module], recipe: str, old: tuple[int], new: tuple[int, ...]
) -> None:
    fresh = flexify(target, [4, 8], **RECIPES[recipe])
    student = randomised(flexify(target, old, **RECIPES[recipe]), seed=1).eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    outputs = {size: predict(student, size) for size in (2, *old)}
    extended = extend(student, new)
    assert [size.name for size in extended.patch_sizes] == ["1x2x2", "1x4x4", "1x8x8"]
    assert all(torch.equal(predict(extended, size), output) for size, output in outputs.items())
    after = extended.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    begun = {name: value for name, value in after.items() if name not in before and "lora_A" not in name}
    assert begun
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in begun.items())
    if RECIPES[recipe]["recipe"] == "lora":
        assert all(not value.any() for name, value in begun.items() if "lora_B" in name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_have_the_order_of_any_student_of_these_sizes(target: FlexiTransformer, recipe: str) -> None:
    """Optimizers count parameters, and ranks of a sharded run build the model from its config."""
    fresh = flexify(target, [4, 8], **RECIPES[recipe])
    extended = extend(flexify(target, [8], **RECIPES[recipe]), [4])
    assert extended.config == fresh.config
    ours, theirs = (
        [(name, p.shape, p.requires_grad) for name, p in model.named_parameters()] for model in (extended, fresh)
    )
    assert ours == theirs


def test_sizes_that_are_there_change_nothing(target: FlexiTransformer) -> None:
    student = flexify(target, [4])
    assert extend(student, [4]) is student


@pytest.mark.parametrize("sizes, complaint", [([1], "1x1x1 is not larger"), (["2x4x4"], "spans 2 frames")])
def test_sizes_that_cannot_be_are_refused(target: FlexiTransformer, sizes: list[Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        extend(flexify(target, [4]), sizes)
    with pytest.raises(ValueError, match="has one patch size"):
        extend(target, [4])
