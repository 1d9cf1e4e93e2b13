from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flexidit import create_model, flexify
from flexidit.models.dit import DiT
from flexidit.recipes import added_parameters, plain_copy, trainable_parameters

Randomise = Callable[..., nn.Module]
BATCH = (torch.tensor([3, 500]), torch.tensor([1, 9]))


@pytest.fixture
def target(randomised: Randomise) -> DiT:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    randomised(model)
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 8, 8)


@pytest.mark.parametrize("sizes", [[4], [4, 8], [3], [3, 8], ["1x2x4"]])
def test_shared_base_size_computes_what_the_target_does(target: DiT, x: Tensor, sizes: list[int]) -> None:
    student = flexify(target, sizes)
    torch.testing.assert_close(student(x, *BATCH, patch_size=2), target(x, *BATCH, patch_size=2), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("underlying", [2, 4, 8])
def test_any_underlying_size_preserves_the_function(target: DiT, x: Tensor, underlying: int) -> None:
    student = flexify(target, [4], underlying_patch_size=underlying)
    torch.testing.assert_close(student(x, *BATCH, patch_size=2), target(x, *BATCH, patch_size=2), atol=2e-6, rtol=1e-6)


def test_lora_base_size_is_the_target_bit_for_bit_before_and_after_training(target: DiT, x: Tensor) -> None:
    student = flexify(target, [4, 8], recipe="lora", rank=4)
    expected = target(x, *BATCH, patch_size=2)
    assert torch.equal(student(x, *BATCH, patch_size=2), expected)
    optimizer = torch.optim.AdamW((p for _, p in trainable_parameters(student)), lr=0.1)
    for patch_size in (4, 8, 4):
        before = student(x, *BATCH, patch_size=patch_size)
        optimizer.zero_grad()
        before.square().mean().backward()
        optimizer.step()
        assert not torch.equal(student(x, *BATCH, patch_size=patch_size), before)
    assert torch.equal(student(x, *BATCH, patch_size=2), expected)


@pytest.mark.parametrize("recipe", ["shared", "lora"])
def test_both_recipes_start_weak_sizes_from_the_same_function(target: DiT, x: Tensor, recipe: str) -> None:
    shared, student = flexify(target, [4]), flexify(target, [4], recipe=recipe, rank=4)  # type: ignore[arg-type]
    torch.testing.assert_close(student(x, *BATCH, patch_size=4), shared(x, *BATCH, patch_size=4), atol=1e-5, rtol=1e-5)


def test_shared_trains_everything_but_positions(target: DiT) -> None:
    student = flexify(target, [4])
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed"}


@pytest.mark.parametrize("patch_size", [4, 8])
def test_lora_trains_exactly_the_parameters_of_the_size_that_ran(
    target: DiT, x: Tensor, patch_size: int, randomised: Randomise
) -> None:
    student = flexify(target, [4, 8], recipe="lora", rank=4)
    randomised(student)  # lora_B starts at zero and would hide the gradients of lora_A
    student(x, *BATCH, patch_size=patch_size).square().mean().backward()
    name = f"1x{patch_size}x{patch_size}"
    touched = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    own = {n for n, p in student.named_parameters() if p.requires_grad and name in n}
    assert touched == own
    kinds = {n.removeprefix("blocks.0.").split(f".{name}")[0] for n in own if not n.startswith("blocks.1.")}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert kinds == {f"{layer}.lora_{factor}" for layer in layers for factor in "AB"} | {
        "x_embedder.per_size",
        "final_layer.linear.per_size",
        "size_embedder",
    }


@pytest.mark.parametrize("recipe", ["shared", "lora"])
def test_checkpointing_and_two_sizes_in_one_backward_change_no_gradient(
    target: DiT, x: Tensor, recipe: str, randomised: Randomise
) -> None:
    def gradients(gradient_checkpointing: bool) -> dict[str, Tensor]:
        student = flexify(target, [4, 8], recipe=recipe, rank=4).double()  # type: ignore[arg-type]
        randomised(student)
        student.gradient_checkpointing = gradient_checkpointing
        loss = sum(student(x.double(), *BATCH, patch_size=size).square().mean() for size in (8, 2, 4))
        assert isinstance(loss, Tensor)
        loss.backward()
        return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-12, rtol=1e-9)


def test_size_norms_start_as_the_identity_and_can_be_turned_off(target: DiT, x: Tensor) -> None:
    with_norms, without = flexify(target, [4]), flexify(target, [4], size_norms=False)
    assert torch.equal(with_norms(x, *BATCH, patch_size=4), without(x, *BATCH, patch_size=4))
    assert sum("scale" in name for name in with_norms.state_dict()) == 2 * 2 + 1
    assert sum("scale" in name for name in without.state_dict()) == 0


def test_positions_option_changes_weak_sizes_only(target: DiT, x: Tensor) -> None:
    coords, grid = flexify(target, [4]), flexify(target, [4], positions="grid")
    assert torch.equal(coords(x, *BATCH, patch_size=2), grid(x, *BATCH, patch_size=2))
    assert not torch.allclose(coords(x, *BATCH, patch_size=4), grid(x, *BATCH, patch_size=4))


def test_share_of_new_parameters_on_xl2() -> None:
    """READING.md, gap 5: 0.005 % cannot hold for p' = 4; the bounds are 0.05 % and 5 % (sections 3.1 and 3.2)."""
    with torch.device("meta"):
        _, shared = added_parameters(flexify(create_model("DiT-XL/2"), [4], keep_target=False))
        _, lora = added_parameters(flexify(create_model("DiT-XL/2"), [4], recipe="lora", keep_target=False))
    assert 0.0001 < shared < 0.0005
    assert 0.005 < lora < 0.05


def test_the_target_is_left_alone_unless_given_up(target: DiT) -> None:
    names = set(target.state_dict())
    flexify(target, [4], recipe="lora", rank=2)
    assert set(target.state_dict()) == names
    assert all(p.requires_grad for n, p in target.named_parameters() if n != "pos_embed")
    assert flexify(target, [4], keep_target=False) is target


def test_what_cannot_be_flexified_is_refused(target: DiT) -> None:
    for sizes in ([2], [1], ["1x1x4"]):
        with pytest.raises(ValueError, match="not larger than the pre-trained"):
            flexify(target, sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spans 2 frames"):
        flexify(target, ["2x2x2"])
    with pytest.raises(ValueError, match="no weak patch size"):
        flexify(target, [])
    with pytest.raises(ValueError, match="flexible already"):
        flexify(flexify(target, [4]), [8])
    with pytest.raises(ValueError, match="unknown recipe"):
        flexify(target, [4], recipe="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smaller than the pre-trained"):
        flexify(target, [4], underlying_patch_size=1)


@pytest.mark.parametrize("recipe", ["shared", "lora"])
@pytest.mark.parametrize("patch_size", [2, 4])
def test_a_plain_copy_computes_what_the_student_does(
    target: DiT, x: Tensor, recipe: str, patch_size: int, randomised: Randomise
) -> None:
    student = flexify(target, [4], recipe=recipe, rank=4, size_norms=False)  # type: ignore[arg-type]
    randomised(student, seed=1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    plain = plain_copy(student, patch_size)
    fresh = create_model("DiT-Tiny/2", patch_size=patch_size, input_size=8, num_classes=10)
    unit = None if patch_size == 2 else student.base_patch_size  # patches stay where they were at any latent size
    assert plain.config == replace(fresh.config, position_unit=unit) and set(plain.state_dict()) == set(
        fresh.state_dict()
    )
    expected = student(x, *BATCH, patch_size=patch_size)
    torch.testing.assert_close(plain(x, *BATCH, patch_size=patch_size), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_a_plain_copy_of_adapters_at_the_base_size_is_the_target(target: DiT, x: Tensor) -> None:
    plain = plain_copy(flexify(target, [4], recipe="lora", rank=4), 2)
    assert torch.equal(plain(x, *BATCH, patch_size=2), target(x, *BATCH, patch_size=2))
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_norms_of_a_weak_size_do_not_fit_into_a_plain_copy(target: DiT, x: Tensor) -> None:
    student = flexify(target, [4])
    expected = target(x, *BATCH, patch_size=2)
    torch.testing.assert_close(plain_copy(student, 2)(x, *BATCH, patch_size=2), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="layer norms of its own"):
        plain_copy(student, 4)
