from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexidit import create_model, flexify
from flexidit.conditions import CaptionKeys, Captions
from flexidit.merged import MergedModel
from flexidit.models import TextDiT
from flexidit.patch_size import PatchSize
from flexidit.sampling.packing import PACKINGS
from flexidit.sampling.sampler import Sampler
from flexidit.sampling.schedule import PatchSchedule

Randomise = Callable[..., nn.Module]
SCHEDULE = PatchSchedule.parse("4:1,2:3/4:3,2:1")  # a step of each kind: weak, guided by the weaker size, powerful
DEPTH = 2
PAPER = [("ddpm", 100), ("dpm++", 20), ("sa", 25), ("ddim", 50)]


@pytest.fixture(scope="module")
def student(randomised: Randomise) -> TextDiT:
    return make(randomised)


def make(randomised: Randomise, **overrides: Any) -> TextDiT:
    target = create_model("TextDiT-Tiny/2", **{"input_size": 8, "hidden_size": 48, **overrides})
    randomised(target.requires_grad_(True))
    made = flexify(target, [4], recipe="lora", rank=2)
    randomised(made, seed=1)  # untrained adapters would change nothing
    assert isinstance(made, TextDiT)
    return made.requires_grad_(False).eval()


def captions(count: int, num_tokens: int = 9, seed: int = 0) -> Captions:
    """Each of another length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 1 + torch.arange(count) % num_tokens
    mask = torch.arange(num_tokens) < lengths[:, None]
    return Captions(torch.randn(count, num_tokens, 64, generator=generator), mask)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(model: Any, y: Any, negative: Captions | None = None, batch_size: int | None = None, **options: Any) -> Tensor:
    sampler = Sampler(model, "ddim", **{"schedule": SCHEDULE, "cfg_scale": 3.0, **options})
    return sampler(y, negative=negative, generator=seeded(), batch_size=batch_size)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """To a millionth of their spread: random weights make samples of hundreds."""
    torch.testing.assert_close(ours, theirs, atol=3e-6 * theirs.std().item(), rtol=1e-5)


def calls_of(model: TextDiT) -> list[int]:
    """Fills with the number of captions at each call of a block's keys and values."""
    calls: list[int] = []
    for block in model.blocks:
        block.cross_attn.kv_linear.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize(("solver", "num_steps"), PAPER)
def test_all_solvers_at_the_settings_of_the_paper(student: TextDiT, solver: str, num_steps: int) -> None:
    schedule = PatchSchedule.weak_first(num_steps=num_steps, weak_steps=num_steps // 2, weak=4, powerful=2)
    sampler = Sampler(student, solver, schedule=schedule, cfg_scale=4.5)
    samples = sampler(captions(2), generator=seeded())
    assert samples.shape == (2, 4, 8, 8) and samples.isfinite().all()
    assert len(sampler.trace) == num_steps and {call.num_sequences for call in sampler.trace} == {4}
    assert [call.patch_size.name for call in sampler.trace] == ["1x4x4"] * (num_steps // 2) + ["1x2x2"] * (
        num_steps - num_steps // 2
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_cache_changes_no_sample(student: TextDiT, merged: bool, scale: float) -> None:
    model = MergedModel(student) if merged else student
    cached, plain = (draw(model, captions(3), cfg_scale=scale, cache_captions=cache) for cache in (True, False))
    assert_close(cached, plain)


def test_the_cache_changes_no_bit_where_all_calls_have_one_shape(student: TextDiT) -> None:
    """Elsewhere a matrix product of other height may round its rows differently."""
    for options in ({"cfg_scale": 1.0}, {"schedule": PatchSchedule.parse("4:2,2:2")}):
        runs = [draw(student, captions(3), cache_captions=cache, **options) for cache in (True, False)]
        assert torch.equal(*runs)


def test_keys_and_values_are_computed_once_for_each_batch(randomised: Randomise) -> None:
    student = make(randomised)
    calls = calls_of(student)
    sampler = Sampler(student, schedule=SCHEDULE, cfg_scale=3.0)
    sampler(captions(5), generator=seeded(), batch_size=2)
    assert calls == [4] * DEPTH * 3 and sampler.num_prepared == 3 * 4
    assert [call.num_prepared for call in sampler.trace] == [4, 0, 0, 0, 0, 0] * 3
    calls.clear()
    Sampler(student, schedule=SCHEDULE)(captions(5), generator=seeded())  # no guidance
    assert calls == [5] * DEPTH
    calls.clear()
    sampler = Sampler(student, schedule=SCHEDULE, cfg_scale=3.0, cache_captions=False)
    sampler(captions(2), generator=seeded())
    assert len(calls) == DEPTH * len(sampler.trace) and sampler.num_prepared == 0
    assert {call.num_prepared for call in sampler.trace} == {None}


def test_labels_are_told_as_they_are() -> None:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    sampler = Sampler(model, schedule=PatchSchedule.constant(2, 2), cfg_scale=3.0)
    sampler([1, 2], generator=seeded())
    assert sampler.num_prepared == 0 and sampler.trace[0].num_prepared is None


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("cache", [True, False])
def test_packing_gives_the_samples_of_separate_calls(student: TextDiT, packing: str, cache: bool) -> None:
    for count in (1, 3, 5):
        packed = draw(student, captions(count), packing=packing, cache_captions=cache)
        assert_close(packed, draw(student, captions(count)))


def test_a_packed_first_step_says_what_was_prepared(student: TextDiT) -> None:
    sampler = Sampler(student, schedule=PatchSchedule.parse("2:2/4:2"), cfg_scale=3.0, packing="split")
    sampler(captions(3), generator=seeded())
    assert sampler.num_prepared == 3  # guided by the weaker size alone: no caption is the null one
    assert [call.num_prepared for call in sampler.trace] == [3, 0, 0, 0]


def test_a_sample_depends_on_its_own_caption_only(student: TextDiT) -> None:
    y = captions(4)
    others = captions(4, seed=1)
    mixed = Captions(torch.cat([y.embeddings[:2], others.embeddings[2:]]), y.mask)
    before, after = draw(student, y), draw(student, mixed)
    assert torch.equal(before[:2], after[:2])
    assert all(not torch.allclose(before[i], after[i], atol=1e-3) for i in (2, 3))


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_batch_split_does_not_matter(student: TextDiT, batch_size: int) -> None:
    y, negative = captions(5), captions(5, num_tokens=4, seed=2)
    whole, split = draw(student, y, negative), draw(student, y, negative, batch_size=batch_size)
    assert_close(split, whole)


def test_the_null_caption_said_aloud_is_the_models_own(student: TextDiT) -> None:
    y = captions(3)
    assert torch.equal(draw(student, y, negative=student.null_condition(y)), draw(student, y))


def test_one_negative_caption_serves_all(student: TextDiT) -> None:
    y, negative = captions(3), captions(1, num_tokens=14, seed=2)  # longer than the captions
    repeated = negative[torch.zeros(3, dtype=torch.long)]
    assert torch.equal(draw(student, y, negative), draw(student, y, repeated))
    assert not torch.allclose(draw(student, y, negative), draw(student, y), atol=1e-3)


def test_weights_without_a_null_caption_take_a_negative_one(randomised: Randomise) -> None:
    student = make(randomised, null_caption=False)
    y = captions(2)
    with pytest.raises(ValueError, match="give negative captions"):
        draw(student, y)
    assert draw(student, y, captions(1, seed=2)).isfinite().all()
    by_weaker_size = PatchSchedule.parse("2:3/4:3")  # makes no unconditional prediction
    expected = draw(student, y, schedule=by_weaker_size)
    assert torch.equal(draw(student, y, captions(1, seed=2), schedule=by_weaker_size), expected)


def test_steps_guided_by_the_weaker_size_are_conditional_in_both_branches(student: TextDiT) -> None:
    seen = []

    class Watched:
        patch_sizes, in_channels = student.patch_sizes, student.in_channels
        learn_sigma, input_size = student.learn_sigma, student.input_size

        def __call__(self, x: Tensor, t: Tensor, y: Captions, *, patch_size: PatchSize) -> Tensor:
            seen.append((patch_size.name, y))
            return student(x, t, y, patch_size=patch_size)

    y = captions(2)
    draw(Watched(), y, schedule=PatchSchedule.parse("2:1/4:1"))
    assert [name for name, _ in seen] == ["1x2x2", "1x4x4"]  # and a callable without prepare() gets captions
    assert all(torch.equal(told.embeddings, y.embeddings) for _, told in seen)


def test_micro_conditions_survive_negative_captions(randomised: Randomise) -> None:
    student = make(randomised, micro_conditions=True)
    told = []
    student.register_forward_pre_hook(lambda module, args: told.append(args[2]))
    y = captions(2)
    small = Captions(y.embeddings, y.mask, torch.full((2, 2), 32))
    with_size, without = (draw(student, condition, captions(1, seed=2)) for condition in (small, y))
    assert all(isinstance(y, CaptionKeys) for y in told) and told[0].image_size.tolist() == [[32, 32]] * 4
    assert not torch.allclose(with_size, without, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_prepared_under_the_same_autocast(student: TextDiT, dtype: torch.dtype | None) -> None:
    """In one shape of calls the cache holds what each step would compute, in the type in which it would."""
    options = {"schedule": PatchSchedule.parse("4:2,2:2"), "autocast": dtype}
    runs = [draw(student, captions(3), cache_captions=cache, **options) for cache in (True, False)]
    assert torch.equal(*runs) and runs[0].dtype == torch.float32


def test_captions_in_the_text_encoders_type(student: TextDiT) -> None:
    y = captions(2)
    low = Captions(y.embeddings.bfloat16(), y.mask)
    rounded = Captions(low.embeddings.float(), y.mask)
    assert torch.equal(draw(student, low, cfg_scale=1.0), draw(student, rounded, cfg_scale=1.0))


def test_compiled_models_take_prepared_captions(randomised: Randomise) -> None:
    student = make(randomised)
    expected = draw(student, captions(2))
    student.compile(backend="eager", fullgraph=True, dynamic=False)
    assert_close(draw(student, captions(2)), expected)
