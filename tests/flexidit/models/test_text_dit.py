from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexidit import create_model, flexify
from flexidit.conditions import Captions
from flexidit.merged import MergedModel
from flexidit.models import TextDiT
from flexidit.recipes import plain_copy
from flexidit.sampling.packing import PACKINGS

Randomise = Callable[..., nn.Module]
T = torch.tensor([10, 800])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "emu": {"qk_norm": True, "position_table": "learned", "learn_sigma": False},
    "1024": {"micro_conditions": True, "position_scale": 2.0, "hidden_size": 48},
}


def captions(num_tokens: int = 9, width: int = 64) -> Captions:
    mask = torch.ones(2, num_tokens, dtype=torch.bool)
    mask[1, num_tokens // 2 :] = False
    return Captions(torch.randn(2, num_tokens, width), mask)


def make(randomised: Randomise, **overrides: Any) -> TextDiT:
    model = create_model("TextDiT-Tiny/2", **{"input_size": 8, **overrides})
    randomised(model)
    assert isinstance(model, TextDiT)
    return model.eval()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 9)])
def test_every_patch_size_returns_the_inputs_size(options: str, size: tuple[int, int], randomised: Randomise) -> None:
    student = flexify(make(randomised, **OPTIONS[options]), [3, 4], recipe="lora", rank=2)
    for patch_size in (2, 3, 4):
        out = student(torch.randn(2, 4, *size), T, captions(), patch_size=patch_size)
        assert out.shape == (2, student.out_channels, *size) and out.isfinite().all()


@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_hidden_tokens_do_not_matter(garbage: float, randomised: Randomise) -> None:
    model, x, y = make(randomised), torch.randn(2, 4, 8, 8), captions()
    spoilt = Captions(torch.where(y.mask.unsqueeze(2), y.embeddings, garbage), y.mask)
    for condition, other in ((y, spoilt), (model.prepare(y), model.prepare(spoilt))):
        assert torch.equal(model(x, T, condition, patch_size=2), model(x, T, other, patch_size=2))


def test_visible_tokens_do_matter(randomised: Randomise) -> None:
    model, x, y = make(randomised), torch.randn(2, 4, 8, 8), captions()
    shown = Captions(y.embeddings, torch.ones_like(y.mask))
    before, after = model(x, T, y, patch_size=2), model(x, T, shown, patch_size=2)
    assert torch.equal(before[0], after[0])  # nothing was hidden there
    assert not torch.allclose(before[1], after[1], atol=1e-4)


def test_the_length_that_captions_are_padded_to_does_not_matter(randomised: Randomise) -> None:
    model, x, y = make(randomised), torch.randn(2, 4, 8, 8), captions()
    expected = model(x, T, y, patch_size=2)
    torch.testing.assert_close(model(x, T, y.padded(16), patch_size=2), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_prepared_captions_give_the_same_at_every_size_merged_or_not(options: str, randomised: Randomise) -> None:
    student = flexify(make(randomised, **OPTIONS[options]), [4], recipe="lora", rank=2)
    randomised(student, seed=1)
    x, y = torch.randn(2, 4, 8, 8), captions()
    for model in (student, MergedModel(student)):
        for patch_size in (2, 4):
            expected = model(x, T, y, patch_size=patch_size)
            assert torch.equal(model(x, T, model.prepare(y), patch_size=patch_size), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("positions", ["coords", "corners", "grid"])
def test_merged_and_plain_copies_compute_what_the_student_does(
    options: str, positions: str, randomised: Randomise
) -> None:
    student = flexify(make(randomised, **OPTIONS[options]), [4], "lora", rank=2, positions=positions)  # type: ignore[arg-type]
    randomised(student, seed=1)
    for x in (torch.randn(2, 4, *size) for size in ((8, 8), (12, 16), (18, 16))):
        expected = student(x, T, y := captions(), patch_size=4)
        for model in (MergedModel(student), plain_copy(student, 4)):
            torch.testing.assert_close(model(x, T, y, patch_size=4), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("prepared", [False, True])
def test_packed_predictions_are_those_of_separate_calls(packing: str, prepared: bool, randomised: Randomise) -> None:
    student = flexify(make(randomised), [4], recipe="lora", rank=2)
    randomised(student, seed=1)
    x, ys = torch.randn(2, 4, 8, 8), [captions(9), captions(5)]
    given = [student.prepare(y) for y in ys] if prepared else ys
    together = student([x, x], [T, T], given, patch_size=[2, 4], packing=PACKINGS[packing])
    for out, y, patch_size in zip(together, ys, (2, 4), strict=True):
        torch.testing.assert_close(out, student(x, T, y, patch_size=patch_size), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_both_recipes_preserve_the_target(options: str, randomised: Randomise) -> None:
    target, x, y = make(randomised, **OPTIONS[options]), torch.randn(2, 4, 8, 8), captions()
    expected = target(x, T, y, patch_size=2)
    assert torch.equal(flexify(target, [4], recipe="lora", rank=2)(x, T, y, patch_size=2), expected)
    torch.testing.assert_close(flexify(target, [4])(x, T, y, patch_size=2), expected, atol=1e-5, rtol=1e-5)


def test_adapters_are_on_self_attention_and_feed_forward_only(randomised: Randomise) -> None:
    student = flexify(make(randomised), [4], recipe="lora", rank=2)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert not any("cross_attn" in name or "y_embedder" in name or "t_block" in name for name in trained)
    layers = {name.split(".lora_")[0].split(".", 2)[2] for name in trained if ".lora_" in name}
    assert layers == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert {name for name in trained if ".lora_" not in name} == {
        "size_embedder.1x4x4",
        *(
            f"{end}.per_size.1x4x4.{kind}"
            for end in ("x_embedder", "final_layer.linear")
            for kind in ("weight", "bias")
        ),
    }


def test_adapters_and_new_ends_are_below_five_percent() -> None:
    """Paper, section 3.2: less than 5 % of the original parameters, for all models tested."""
    from flexidit.recipes import added_parameters

    for name, rank in (("PixArt-XL/2-256", 32), ("Emu-1.7B", 64)):
        with torch.device("meta"):
            _, share = added_parameters(
                flexify(create_model(name), [4], recipe="lora", rank=rank, keep_target=False)  # type: ignore[type-var]
            )
        assert 0.005 < share < 0.05


def test_null_captions(randomised: Randomise) -> None:
    model, y = make(randomised), captions()
    null = model.null_condition(y)
    assert torch.equal(null.mask, y.mask)
    assert torch.equal(null.embeddings[0], null.embeddings[1])
    assert "y_embedder.y_embedding" in model.state_dict()
    with pytest.raises(ValueError, match="longer than the model's 16"):
        model.null_condition(captions(17))
    without = create_model("TextDiT-Tiny/2", input_size=8, null_caption=False)
    assert "y_embedder.y_embedding" not in without.state_dict()
    with pytest.raises(ValueError, match="give negative captions"):
        without.null_condition(y)


def test_image_size_is_that_of_the_sample_unless_given(randomised: Randomise) -> None:
    model, x, y = make(randomised, **OPTIONS["1024"]), torch.randn(2, 4, 8, 12), captions()
    given = Captions(y.embeddings, y.mask, torch.tensor([[64.0, 96.0]]).expand(2, -1))
    other = Captions(y.embeddings, y.mask, torch.tensor([[96.0, 64.0]]).expand(2, -1))
    expected = model(x, T, y, patch_size=2)
    assert torch.equal(model(x, T, given, patch_size=2), expected)
    assert not torch.allclose(model(x, T, other, patch_size=2), expected)


def test_learned_positions_have_no_scale() -> None:
    with pytest.raises(ValueError, match="position_scale must be 1, got 2.0"):
        create_model("PixArt-XL/2-1024", position_table="learned")


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries(randomised: Randomise) -> None:
    model, x, y = make(randomised, qk_norm=True, depth=1), torch.randn(2, 4, 8, 8), captions()
    attn: Any = model.blocks[0].attn
    attn.q_norm.reset_parameters(), attn.k_norm.reset_parameters()
    expected = model(x, T, y, patch_size=2)
    with torch.no_grad():
        attn.qkv.weight[:128] *= 8  # queries and keys
        attn.qkv.bias[:128] *= 8
    torch.testing.assert_close(model(x, T, y, patch_size=2), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_checkpointing_changes_no_gradient(gradient_checkpointing: bool, randomised: Randomise) -> None:
    student = flexify(make(randomised), [4, 8], recipe="lora", rank=2).double()
    randomised(student, seed=1)
    x, y = torch.randn(2, 4, 8, 8).double(), Captions(captions().embeddings.double(), captions().mask)

    def gradients(recompute: bool) -> dict[str, Tensor]:
        student.gradient_checkpointing = recompute
        student.zero_grad()
        loss = sum(student(x, T, y, patch_size=size).square().mean() for size in (8, 2, 4))
        assert isinstance(loss, Tensor)
        loss.backward()
        return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}

    reference, ours = gradients(False), gradients(gradient_checkpointing)
    assert reference.keys() == ours.keys() == {n for n, p in student.named_parameters() if p.requires_grad}
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-12, rtol=1e-9)


def test_one_graph_per_patch_size(randomised: Randomise) -> None:
    student = flexify(make(randomised), [4], recipe="lora", rank=2)
    x, y, num_graphs = torch.randn(2, 4, 8, 8), captions(), 0

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(student, dynamic=False, fullgraph=True, backend=count)
    prepared = student.prepare(y)
    for _ in range(3):
        for patch_size in (2, 4):
            expected = student(x, T, prepared, patch_size=patch_size)
            torch.testing.assert_close(compiled(x, T, prepared, patch_size=patch_size), expected)
    assert num_graphs == 2
