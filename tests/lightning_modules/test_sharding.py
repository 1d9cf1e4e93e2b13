"""Which options of sharding are refused, and what is not rounded; real processes are in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexidit import create_model, flexify
from lightning_modules.sharding import check_gathering, frozen_vectors, half_precision

TINY = {"input_size": (4, 8, 8), "hidden_size": 48, "num_heads": 2, "depth": 1}


def test_half_precision_is_of_weights_alone() -> None:
    policy = half_precision()
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert not policy.cast_forward_inputs  # the time step 999 would become 1000


@pytest.mark.parametrize("variant", ["Wan-Tiny", "VideoDiT-Tiny"])
def test_vectors_that_do_not_train_are_few_and_no_layer_s(variant: str) -> None:
    student = flexify(create_model(variant, **TINY), ["2x2x2"], "lora", rank=4)
    block = student.blocks[0]
    kept = frozen_vectors(block)
    layers = {p for module in block.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    trained = {p for p in block.parameters() if p.requires_grad}
    assert kept and not kept & (layers | trained)
    assert kept | layers == set(block.parameters())
    assert sum(p.numel() for p in kept) < 0.02 * sum(p.numel() for p in block.parameters())  # wider: less


def test_vectors_that_train_are_sharded_like_the_rest() -> None:
    assert not frozen_vectors(create_model("Wan-Tiny", **TINY).blocks[0])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("half", "bf16-mixed", True), "gather_dtype is float32 or bfloat16, got 'half'"),
        (("bfloat16", "bf16-mixed", False), "add configs/trainer/fsdp.yaml"),
        (("bfloat16", "32-true", True), "not with 32-true"),
    ],
)
def test_what_would_not_work_is_refused(given: tuple[str, str, bool], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_gathering(*given)


@pytest.mark.parametrize(
    "given", [("bfloat16", "bf16-mixed", True), ("float32", "32-true", False), ("float32", "bf16-mixed", True)]
)
def test_what_works_is_accepted(given: tuple[str, str, bool]) -> None:
    check_gathering(*given)
