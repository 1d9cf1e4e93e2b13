from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from flexidit import create_model, flexify
from flexidit.identity import added_tensors, base_hash, base_tensors
from flexidit.models import FlexiTransformer
from flexidit.recipes import trainable_parameters

NAMES = ("DiT-Tiny/2", "TextDiT-Tiny/2")


@pytest.fixture(params=NAMES)
def target(request: pytest.FixtureRequest) -> FlexiTransformer:
    return create_model(request.param, input_size=8)


def test_adapters_and_their_training_leave_the_hash(
    target: FlexiTransformer, randomised: Callable[..., nn.Module]
) -> None:
    before = base_hash(target)
    student = flexify(target, [4, 8], recipe="lora", rank=2)
    randomised(student)
    assert base_hash(student) == before
    assert base_hash(student.requires_grad_(True)) == before


def test_any_other_weight_changes_it(target: FlexiTransformer) -> None:
    seen = {base_hash(target)}
    state = {name: tensor for name, tensor in target.state_dict().items() if name != "pos_embed"}
    for tensor in state.values():
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        seen.add(base_hash(target))
    assert len(seen) == 1 + len(state)


def test_a_wider_type_is_the_same_base_and_a_narrower_one_is_not(target: FlexiTransformer) -> None:
    full = base_hash(target)
    half = base_hash(target.half())
    assert half != full
    assert base_hash(target.float()) == half


def test_computed_positions_do_not_count_and_learned_ones_do() -> None:
    hashes = []
    for table in ("sincos", "learned"):
        model = create_model("TextDiT-Tiny/2", input_size=8, position_table=table)
        before = base_hash(model)
        with torch.no_grad():
            model.pos_embed += 1e-7 if table == "sincos" else 1
        hashes.append(base_hash(model) == before)
    assert hashes == [True, False]


def test_compiled_and_checkpointed_blocks_have_the_same_names(target: FlexiTransformer) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    before = base_hash(target)
    for i, block in enumerate(target.blocks):
        target.blocks[i] = torch.compile(checkpoint_wrapper(block))  # type: ignore[assignment]
    assert base_hash(target) == before


def test_the_two_parts_are_the_target_and_what_trains(target: FlexiTransformer) -> None:
    student = flexify(target, [4], recipe="lora", rank=2)
    state = student.state_dict()
    assert set(base_tensors(state)) == set(target.state_dict())
    assert set(added_tensors(state)) == {name for name, _ in trainable_parameters(student)}
