"""TextDiT on clips: the paper's Video DiT, flexible in time and in space."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from flexidit import PatchSchedule, Sampler, create_model, flexify, load_checkpoint
from flexidit.checkpoint import save_checkpoint
from flexidit.conditions import Captions
from flexidit.merged import MergedModel
from flexidit.models import TextDiT
from flexidit.patch_size import PatchSize
from flexidit.recipes import plain_copy, trainable_parameters
from flexidit.sampling.packing import PACKINGS

Randomise = Callable[..., nn.Module]
T = torch.tensor([10, 800])
WEAK: list[int | str] = ["2x2x2", "1x4x4", "2x4x4"]
TABLES: dict[str, dict[str, Any]] = {"sincos": {}, "learned": {"position_table": "learned"}}


def captions(num_tokens: int = 9, width: int = 64) -> Captions:
    mask = torch.ones(2, num_tokens, dtype=torch.bool)
    mask[1, num_tokens // 2 :] = False
    return Captions(torch.randn(2, num_tokens, width), mask)


def make(randomised: Randomise, **overrides: Any) -> TextDiT:
    model = create_model("VideoDiT-Tiny", **{"input_size": (5, 8, 8), **overrides})
    randomised(model)
    assert isinstance(model, TextDiT)
    return model.eval()


def student_of(randomised: Randomise, **overrides: Any) -> TextDiT:
    student = flexify(make(randomised, **overrides), WEAK, recipe="lora", rank=2)
    randomised(student, seed=1)
    return student


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("size", [*product((4, 5), (8, 7, 6, 5), (8,)), (3, 9, 11), (1, 8, 8), (6, 12, 10)])
def test_every_mode_takes_any_clip(table: str, size: tuple[int, int, int], randomised: Randomise) -> None:
    """Every remainder of 2 frames and of 4 rows, and odd sizes along all axes at once."""
    student = student_of(randomised, **TABLES[table])
    x, y = torch.randn(2, 1, *size), captions()
    for patch_size in student.patch_sizes:
        out = student(x, T, y, patch_size=patch_size)
        assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("patch_size", WEAK)
def test_what_a_patch_does_not_cover_is_the_border_repeated(patch_size: str, randomised: Randomise) -> None:
    """A clip that ends inside a patch has the tokens of the clip that its own border fills up."""
    student, size = student_of(randomised), PatchSize.parse(patch_size)
    x = torch.randn(2, 1, 5, 7, 6)
    whole = [-(-side // patch) * patch for side, patch in zip(x.shape[2:], size.as_tuple(), strict=True)]
    frames, rows, columns = (torch.arange(n).clamp(max=m - 1) for n, m in zip(whole, x.shape[2:], strict=True))
    padded = x[:, :, frames][:, :, :, rows][..., columns]
    ours, theirs = (student.embedding(clip, patch_size=size) for clip in (x, padded))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recipe", ["shared", "lora"])
@pytest.mark.parametrize("table", TABLES)
def test_the_base_mode_is_the_target(table: str, recipe: Literal["shared", "lora"], randomised: Randomise) -> None:
    target, x, y = make(randomised, **TABLES[table]), torch.randn(2, 1, 5, 8, 8), captions()
    expected, student = target(x, T, y, patch_size=2), flexify(target, WEAK, recipe=recipe, rank=2)
    if recipe == "shared":
        torch.testing.assert_close(student(x, T, y, patch_size=2), expected, atol=1e-5, rtol=1e-5)
        return
    optimizer = torch.optim.AdamW((p for _, p in trainable_parameters(student)), lr=0.1)
    for patch_size in WEAK:
        optimizer.zero_grad()
        student(x, T, y, patch_size=patch_size).square().mean().backward()
        optimizer.step()
    assert torch.equal(student(x, T, y, patch_size=2), expected)


@pytest.mark.parametrize("patch_size", WEAK)
def test_a_mode_trains_its_own_adapter_embedding_and_vector(patch_size: str, randomised: Randomise) -> None:
    student, name = student_of(randomised), PatchSize.parse(patch_size).name
    student(torch.randn(2, 1, 5, 8, 8), T, captions(), patch_size=patch_size).square().mean().backward()
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None}
    own = {n for n, p in student.named_parameters() if p.requires_grad and name in n.split(".")}
    assert with_gradient == own and any("size_embedder" in n for n in own) and any("per_size" in n for n in own)


def test_a_temporal_patch_starts_as_the_duplicated_weights_of_one_frame(randomised: Randomise) -> None:
    """READING.md 10: the embedding of two frames is the mean of theirs, and both get the same prediction."""
    student = flexify(make(randomised).double(), WEAK, recipe="lora", rank=2)
    pair, size = torch.randn(2, 1, 2, 8, 8, dtype=torch.float64), PatchSize.parse("2x2x2")
    together = student.embedding(pair, patch_size=size)
    apart = [student.embedding(frame, patch_size=student.base_patch_size) for frame in pair.split(1, dim=2)]
    torch.testing.assert_close(together, (apart[0] + apart[1]) / 2)
    tokens = torch.randn(2, 16, 64, dtype=torch.float64)
    patches = student.unembedding(tokens, patch_size=size).unflatten(2, (2, -1))
    torch.testing.assert_close(patches[:, :, 0], student.unembedding(tokens, patch_size=student.base_patch_size))
    torch.testing.assert_close(patches[:, :, 0], patches[:, :, 1])


@pytest.mark.parametrize("table", TABLES)
def test_a_weak_patch_sits_at_its_centre_in_time_and_space(table: str, randomised: Randomise) -> None:
    """Where its first and its last base patch are, on the average, as far as tables are linear in between."""
    student = student_of(randomised, **TABLES[table])
    centres = student.coordinates(PatchSize.parse("2x4x4"), (4, 8, 8))
    assert [axis.tolist() for axis in centres] == [[0.5, 2.5], [0.5, 2.5], [0.5, 2.5]]
    if table == "learned":
        base = student.positions(PatchSize.parse(2), (4, 8, 8)).view(4, 4, 4, -1)
        means = base.view(2, 2, 2, 2, 2, 2, -1).mean(dim=(1, 3, 5)).flatten(0, 2)
        torch.testing.assert_close(student.positions(PatchSize.parse("2x4x4"), (4, 8, 8))[0], means)


def test_the_first_frame_sits_where_an_image_does(randomised: Randomise) -> None:
    video, image = make(randomised), create_model("VideoDiT-Tiny", input_size=(8, 8))
    base = video.base_patch_size
    assert torch.equal(video.positions(base, (5, 8, 8))[:, :16], image.positions(base, (8, 8)))  # type: ignore[operator]


def test_the_order_of_frames_matters(randomised: Randomise) -> None:
    model, x, y = make(randomised), torch.randn(2, 1, 5, 8, 8), captions()
    flipped = model(x.flip(2), T, y, patch_size=2).flip(2)
    assert not torch.allclose(flipped, model(x, T, y, patch_size=2), atol=1e-4)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_modes_are_those_of_separate_calls(packing: str, randomised: Randomise) -> None:
    student = student_of(randomised)
    x, y = torch.randn(2, 1, 5, 8, 8), captions()
    sizes = ["1x2x2", "2x2x2", "2x4x4"]
    together = student([x] * 3, [T] * 3, [y] * 3, patch_size=sizes, packing=PACKINGS[packing])
    for out, size in zip(together, sizes, strict=True):
        torch.testing.assert_close(out, student(x, T, y, patch_size=size), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("positions", ["coords", "grid"])
def test_merged_and_plain_copies_compute_what_the_student_does(
    table: str, positions: Literal["coords", "grid"], randomised: Randomise
) -> None:
    student = flexify(make(randomised, **TABLES[table]), WEAK, "lora", rank=2, positions=positions)
    randomised(student, seed=1)
    merged, y = MergedModel(student), captions()
    for patch_size, size in product(WEAK, [(5, 8, 8), (7, 12, 10)]):
        x = torch.randn(2, 1, *size)
        expected = student(x, T, y, patch_size=patch_size)
        for model in (merged, plain_copy(student, patch_size)):
            torch.testing.assert_close(model(x, T, y, patch_size=patch_size), expected, atol=1e-5, rtol=1e-5)


def test_checkpointing_does_not_change_gradients_of_several_modes_in_one_backward(randomised: Randomise) -> None:
    student, x, y = student_of(randomised).train(), torch.randn(2, 1, 5, 8, 8), captions()
    gradients = []
    for student.gradient_checkpointing in (False, True):
        student.zero_grad()
        sum(student(x, T, y, patch_size=size).square().mean() for size in WEAK).backward()  # type: ignore[union-attr]
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("adapters_only", [False, True])
def test_a_checkpoint_reads_back(table: str, adapters_only: bool, randomised: Randomise, tmp_path: Path) -> None:
    target = make(randomised, **TABLES[table])
    base = save_checkpoint(target, tmp_path / "base.safetensors")
    student = flexify(target, WEAK, "lora", rank=2)
    randomised(student, seed=1)
    path = save_checkpoint(
        student.eval(), tmp_path / "student.safetensors", adapters_only=adapters_only, base_source=str(base)
    )
    x, y, again = torch.randn(2, 1, 6, 8, 9), captions(), load_checkpoint(path)
    assert again.config == student.config
    for patch_size in student.patch_sizes:
        assert torch.equal(again(x, T, y, patch_size=patch_size), student(x, T, y, patch_size=patch_size))


def test_layouts_without_clips_are_refused(randomised: Randomise, tmp_path: Path) -> None:
    model = make(randomised)
    for layout in ("official", "diffusers"):
        with pytest.raises(ValueError, match="clips"):
            save_checkpoint(model, tmp_path / layout, layout_format=layout)  # type: ignore[arg-type]
    torch.save(model.state_dict(), tmp_path / "official.pth")
    with pytest.raises(ValueError, match="model of clips"):
        load_checkpoint(tmp_path / "official.pth")


def test_temporal_patches_are_for_models_of_clips(randomised: Randomise) -> None:
    image = create_model("TextDiT-Tiny/2", input_size=8)
    with pytest.raises(ValueError, match="2x2x2 spans 2 frames, but this model takes images"):
        flexify(image, ["2x2x2"])
    with pytest.raises(ValueError, match="spans 2 frames"):
        create_model("TextDiT-Tiny/2", input_size=8, patch_size="2x2x2")


def test_a_schedule_may_mix_modes_within_one_sample(randomised: Randomise) -> None:
    student = student_of(randomised)
    schedule = PatchSchedule.parse("2x4x4:2,1x4x4:2,2x2x2:2,1x2x2:2")
    sampler = Sampler(student, schedule=schedule, cfg_scale=2.0)
    noise = torch.randn(2, 1, 5, 8, 8)
    clips = sampler(captions(), noise=noise, generator=torch.Generator().manual_seed(0))
    assert clips.shape == noise.shape and clips.isfinite().all()
    assert [call.patch_size.name for call in sampler.trace[::2]] == ["2x4x4", "1x4x4", "2x2x2", "1x2x2"]


def test_the_paper_s_model_has_its_parameters() -> None:
    with torch.device("meta"):
        model = create_model("VideoDiT-4.9B")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(4.9e9, rel=0.01)
    tokens = [PatchSize.parse(size).num_tokens(model.input_size) for size in ("1x2x2", "2x2x2", "1x4x4")]
    assert tokens == [33792, 16896, 8448]  # READING.md
