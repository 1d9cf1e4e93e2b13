from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from flexidit import PatchSchedule, Sampler, create_model, flexify
from flexidit.conditions import Captions
from flexidit.merged import MergedModel
from flexidit.models import Wan
from flexidit.patch_size import PatchSize
from flexidit.recipes import plain_copy
from flexidit.sampling.packing import PACKINGS

Randomise = Callable[..., nn.Module]
T = torch.tensor([10.25, 800.0])
BASE = PatchSize(1, 2, 2)
WEAK: list[int | str] = ["2x2x2", "1x4x4", "2x4x4"]


def captions(num_tokens: int = 9, width: int = 64) -> Captions:
    mask = torch.ones(2, num_tokens, dtype=torch.bool)
    mask[1, num_tokens // 2 :] = False
    return Captions(torch.randn(2, num_tokens, width), mask)


def make(randomised: Randomise, **overrides: Any) -> Wan:
    model = create_model("Wan-Tiny", **{"input_size": (5, 8, 8), **overrides})
    randomised(model)
    assert isinstance(model, Wan)
    return model.eval()


def student_of(randomised: Randomise, **options: Any) -> Wan:
    student = flexify(make(randomised), WEAK, **{"recipe": "lora", "rank": 2, **options})
    randomised(student, seed=1)
    return student


@pytest.mark.parametrize("size", [*product((4, 5), (8, 7, 6, 5), (8,)), (3, 9, 11), (1, 8, 8), (6, 12, 10)])
def test_every_mode_takes_any_clip(size: tuple[int, int, int], randomised: Randomise) -> None:
    student = student_of(randomised)
    x, y = torch.randn(2, 1, *size), captions()
    for patch_size in student.patch_sizes:
        out = student(x, T, y, patch_size=patch_size)
        assert out.shape == x.shape and out.isfinite().all()


def test_both_recipes_preserve_the_target(randomised: Randomise) -> None:
    target, x, y = make(randomised).double(), torch.randn(2, 1, 5, 8, 6).double(), captions()
    expected = target(x, T, y, patch_size=2)
    student = flexify(target, WEAK, recipe="lora", rank=2)
    randomised(student, seed=1)
    assert torch.equal(student(x, T, y, patch_size=2), expected)
    torch.testing.assert_close(flexify(target, WEAK)(x, T, y, patch_size=2), expected, atol=1e-11, rtol=1e-11)


def test_norms_of_the_shared_recipe_are_those_without_weights(randomised: Randomise) -> None:
    student = student_of(randomised, recipe="shared")
    scaled = {name.split(".scale.")[0] for name, _ in student.named_parameters() if ".scale." in name}
    assert scaled == {*(f"blocks.{i}.norm{n}" for i in range(2) for n in (1, 2)), "head.norm"}
    out = [student(torch.randn(2, 1, 5, 8, 8), T, captions(), patch_size=size) for size in student.patch_sizes]
    assert all(one.isfinite().all() for one in out)


def test_adapters_are_on_self_attention_and_perceptron_only(randomised: Randomise) -> None:
    trained = {name for name, p in student_of(randomised).named_parameters() if p.requires_grad}
    layers = {name.split(".lora_")[0].split(".", 2)[2] for name in trained if ".lora_" in name}
    assert layers == {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2"}
    sizes = ("2x2x2", "1x4x4", "2x4x4")
    ends = product(("patch_embedding", "head.head"), sizes, ("weight", "bias"))
    assert {name for name in trained if ".lora_" not in name} == {
        *(f"size_embedder.{size}" for size in sizes),
        *(f"{end}.per_size.{size}.{kind}" for end, size, kind in ends),
    }


@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_hidden_tokens_are_zeros_and_captions_are_filled_up_with_zeros(garbage: float, randomised: Randomise) -> None:
    model, x, y = make(randomised), torch.randn(2, 1, 4, 8, 8), captions()
    spoilt = Captions(torch.where(y.mask.unsqueeze(2), y.embeddings, garbage), y.mask)
    zeros = torch.zeros(2, 16, 64)
    zeros[0, :9], zeros[1, :4] = y.embeddings[0], y.embeddings[1, :4]
    shown = Captions(zeros, torch.ones(2, 16, dtype=torch.bool))
    expected = model(x, T, y, patch_size=2)
    for other in (spoilt, shown, y.padded(12), model.prepare(y), model.prepare(spoilt)):
        assert torch.equal(model(x, T, other, patch_size=2), expected)


def test_what_fills_a_caption_is_attended_to(randomised: Randomise) -> None:
    """As in Wan, which has no mask: what is seen of a caption depends on the length that it is filled up to."""
    model, x, y = make(randomised), torch.randn(2, 1, 4, 8, 8), captions()
    shorter = Wan(model.config.__class__(**{**vars(model.config), "caption_length": 9}))
    shorter.load_state_dict(model.state_dict())
    assert not torch.allclose(shorter(x, T, y, patch_size=2), model(x, T, y, patch_size=2), atol=1e-3)


def test_captions_that_are_too_long_and_the_missing_null_caption_are_said(randomised: Randomise) -> None:
    model = make(randomised)
    with pytest.raises(ValueError, match="captions of 17 tokens are longer than the model's 16"):
        model(torch.randn(2, 1, 4, 8, 8), T, captions(17), patch_size=2)
    with pytest.raises(ValueError, match="give negative captions"):
        model.null_condition(captions())
    assert not model.config.has_null_caption


def test_prepared_captions_give_the_same_in_every_mode_merged_or_not(randomised: Randomise) -> None:
    student, x, y = student_of(randomised), torch.randn(2, 1, 5, 8, 8), captions()
    for model in (student, MergedModel(student)):
        for patch_size in student.patch_sizes:
            expected = model(x, T, y, patch_size=patch_size)
            assert torch.equal(model(x, T, model.prepare(y), patch_size=patch_size), expected)


@pytest.mark.parametrize("positions", ["coords", "corners", "grid"])
def test_merged_and_plain_copies_compute_what_the_student_does(
    positions: Literal["coords", "corners", "grid"], randomised: Randomise
) -> None:
    student, y = student_of(randomised, positions=positions).double(), captions()
    for patch_size in student.patch_sizes[1:]:
        plain = plain_copy(student, patch_size)
        assert positions != "grid" or plain.config.position_unit is None
        for size in ((5, 8, 8), (3, 12, 16), (4, 7, 8)):
            x = torch.randn(2, 1, *size).double()
            expected = student(x, T, y, patch_size=patch_size)
            for model in (MergedModel(student), plain):
                torch.testing.assert_close(model(x, T, y, patch_size=patch_size), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("recipe", ["shared", "lora"])
@pytest.mark.parametrize("prepared", [False, True])
def test_packed_modes_are_those_of_separate_calls(
    packing: str, recipe: str, prepared: bool, randomised: Randomise
) -> None:
    student = student_of(randomised, recipe=recipe).double()
    x, ys = [torch.randn(2, 1, 5, 8, 8).double() for _ in range(4)], [captions(n) for n in (9, 5, 16, 1)]
    times = [T, T.flip(0), T / 2, T / 3]
    given = [student.prepare(y) for y in ys] if prepared else ys
    together = student(x, times, given, patch_size=list(student.patch_sizes), packing=PACKINGS[packing])
    for out, xi, t, y, size in zip(together, x, times, ys, student.patch_sizes, strict=True):
        torch.testing.assert_close(out, student(xi, t, y, patch_size=size), atol=1e-11, rtol=1e-11)


def test_perturbing_one_packed_clip_leaves_the_others_unchanged(randomised: Randomise) -> None:
    student, ys = student_of(randomised), [captions(), captions()]
    x, sizes = [torch.randn(2, 1, 4, 8, 8) for _ in range(2)], [student.patch_sizes[0], student.patch_sizes[3]]
    moved = [x[0].clone(), x[1].clone()]
    moved[1][0] += 100
    for packing in PACKINGS.values():
        before = student(x, [T, T], ys, patch_size=sizes, packing=packing)
        after = student(moved, [T, T], ys, patch_size=sizes, packing=packing)
        same = [[torch.equal(a, b) for a, b in zip(p, q, strict=True)] for p, q in zip(before, after, strict=True)]
        assert same == [[True, True], [False, True]]


def test_scores_depend_on_distances_only() -> None:
    """Rotated queries and keys of two tokens: the score is that of any two as far apart (Su et al. 2021)."""
    model = create_model("Wan-Tiny", input_size=(5, 12, 12))
    assert isinstance(model, Wan)
    rotate = model.double().rotation(BASE, (5, 12, 12))
    q, k = (torch.randn(1, 1, 1, 16).double().expand(1, 5 * 6 * 6, 1, 16) for _ in range(2))
    scores = (rotate(q).squeeze() @ rotate(k).squeeze().T).view(5, 6, 6, 5, 6, 6)
    torch.testing.assert_close(scores[1, 2, 3, 2, 4, 1], scores[3, 0, 4, 4, 2, 2])
    assert (scores[1, 2, 3, 2, 4, 1] - scores[1, 2, 3, 2, 4, 0]).abs() > 1e-4


@pytest.mark.parametrize("patch_size", ["2x2x2", "1x4x4", "2x4x4"])
def test_weak_patches_are_rotated_as_the_centre_of_those_they_cover(patch_size: str, randomised: Randomise) -> None:
    student, size = student_of(randomised).double(), PatchSize.parse(patch_size)
    angles = _angles(student, BASE, (6, 8, 12)).view(6, 4, 6, 8)
    weak = _angles(student, size, (6, 8, 12)).view(*size.grid((6, 8, 12)), 8)
    t, h, w = size.t, size.h // 2, size.w // 2
    covered = angles.view(6 // t, t, 4 // h, h, 6 // w, w, 8).mean(dim=(1, 3, 5))
    torch.testing.assert_close(weak, covered)


def _angles(model: Wan, patch_size: PatchSize, size: tuple[int, int, int]) -> Tensor:
    from flexidit.positions import rotary_angles

    return rotary_angles(*model.coordinates(patch_size, size), 16)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_checkpointing_changes_no_gradient(gradient_checkpointing: bool, randomised: Randomise) -> None:
    student = student_of(randomised).double()
    x, y = torch.randn(2, 1, 5, 8, 8).double(), captions()

    def gradients(recompute: bool) -> dict[str, Tensor]:
        student.gradient_checkpointing = recompute
        student.zero_grad()
        loss = sum(student(x, T, y, patch_size=size).square().mean() for size in student.patch_sizes)
        assert isinstance(loss, Tensor)
        loss.backward()
        return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}

    reference, ours = gradients(False), gradients(gradient_checkpointing)
    assert reference.keys() == ours.keys() == {n for n, p in student.named_parameters() if p.requires_grad}
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-12, rtol=1e-9)


def test_one_graph_per_patch_size(randomised: Randomise) -> None:
    student = student_of(randomised)
    x, y, num_graphs = torch.randn(2, 1, 5, 8, 8), captions(), 0

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(student, dynamic=False, fullgraph=True, backend=count)
    prepared = student.prepare(y)
    for _ in range(2):
        for patch_size in (2, "2x4x4"):
            expected = student(x, T, prepared, patch_size=patch_size)
            torch.testing.assert_close(compiled(x, T, prepared, patch_size=patch_size), expected)
    assert num_graphs == 2


@pytest.mark.parametrize("recipe", ["shared", "lora"])
def test_half_precision_is_near_by_autocast_and_by_weights(recipe: str, randomised: Randomise) -> None:
    """And its residual stream stays in float32: an update of a thousandth of it does not vanish."""
    student, x, y = student_of(randomised, recipe=recipe), torch.randn(2, 1, 5, 8, 8), captions()
    expected = [student(x, T, y, patch_size=size) for size in student.patch_sizes]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = [student(x, T, y, patch_size=size) for size in student.patch_sizes]
    student.bfloat16()
    stream: list[torch.dtype] = []
    student.blocks[1].register_forward_pre_hook(lambda module, arguments: stream.append(arguments[0].dtype))
    half = [student(x.bfloat16(), T, y, patch_size=size) for size in student.patch_sizes]
    assert set(stream) == {torch.float32}
    for one in (mixed, half):
        for ours, exact in zip(one, expected, strict=True):
            assert (ours.float() - exact).abs().mean() < 0.03 * exact.abs().mean()


@pytest.mark.parametrize(
    "overrides",
    [{"input_size": (16, 16)}, {"learn_sigma": True}, {"process": "diffusion", "time_shift": 1.0}, {"hidden_size": 16}],
)
def test_what_is_no_wan_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match=r"give input_size as|no variance: set learn_sigma=False|leave process at|give an even number from 6",
    ):
        create_model("Wan-Tiny", **overrides)


def test_every_mode_runs_on_real_latents(test_data: Path, randomised: Randomise) -> None:
    """Wan's own VAE made them: 21 frames of 40x64, which a patch of two frames does not divide."""
    latents = torch.load(
        test_data / "videos" / "test_latents_wan.pth", map_location="cpu"
    ).float()  # (1, 16, 16, 40, 64)
    clip = torch.cat([latents, latents[:, :, :5]], dim=2)[..., ::4, ::4]
    model = create_model("Wan-1.3B", input_size=(21, 10, 16), depth=1, hidden_size=96, num_heads=2, caption_length=8)
    student = flexify(randomised(model), WEAK, recipe="lora", rank=2)  # type: ignore[type-var]
    y = Captions(torch.randn(1, 8, 4096), torch.ones(1, 8, dtype=torch.bool))
    for patch_size in student.patch_sizes:
        out = student(clip, T[:1], y, patch_size=patch_size)
        assert out.shape == clip.shape and out.isfinite().all()


def test_a_schedule_may_mix_modes(randomised: Randomise) -> None:
    student = student_of(randomised)
    schedule = PatchSchedule.parse("1x4x4:2,2x2x2:1,1x2x2:1")
    sampler = Sampler(student, schedule=schedule, cfg_scale=3.0)
    x = sampler(captions(), negative=captions(1)[:1], generator=torch.Generator().manual_seed(0))
    assert x.shape == (2, 1, 5, 8, 8) and x.isfinite().all()
    assert [call.patch_size.name for call in sampler.trace] == ["1x4x4", "1x4x4", "2x2x2", "1x2x2"]
