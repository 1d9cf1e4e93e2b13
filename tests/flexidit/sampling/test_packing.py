from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flexidit import create_model, flexify
from flexidit.flops import batch_flops, forward_flops, trace_cost
from flexidit.merged import MergedModel
from flexidit.models.dit import DiT
from flexidit.patch_size import PatchSize
from flexidit.sampling.packing import PACKINGS, pack_groups, pack_rows, packing_of
from flexidit.sampling.sampler import Sampler
from flexidit.sampling.schedule import PatchSchedule
from flexidit.token_layout import BlockWork, Segment, TokenLayout

Batch = tuple[Tensor, Tensor, Tensor]
Randomise = Callable[..., nn.Module]

POWERFUL, WEAK = PatchSize.parse(2), PatchSize.parse(4)
SIZES = [POWERFUL, WEAK]
RECIPES = ("shared", "lora")


@pytest.fixture(scope="session")
def students(randomised: Randomise) -> dict[str, DiT]:
    """Of each recipe, with norms, adapters and vectors of the weak sizes that matter."""
    target = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    made = {recipe: flexify(target, [3, 4, 8], recipe=recipe, rank=4) for recipe in RECIPES}
    for student in made.values():
        randomised(student.requires_grad_(True))
        student.requires_grad_(False)
    return {recipe: student.eval() for recipe, student in made.items()}


def batch(num_images: int, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_images, 4, *size, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (num_images,), generator=generator)
    return x, t, torch.randint(10, (num_images,), generator=generator)


def in_lists(*batches: Batch) -> list[list[Tensor]]:
    return [list(tensors) for tensors in zip(*batches, strict=True)]


@pytest.mark.parametrize("num_images", [1, 3, 4, 6])
@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_separate_calls(students: dict[str, DiT], recipe: str, name: str, num_images: int) -> None:
    """Other latents, times and labels in each segment: no packing may rely on their being equal."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        student = students[recipe].to(dtype)
        pair = [(x.to(dtype), t, y) for x, t, y in (batch(num_images, seed=0), batch(num_images, seed=1))]
        packed = student(*in_lists(*pair), patch_size=SIZES, packing=PACKINGS[name])
        alone = [student(*b, patch_size=size) for b, size in zip(pair, SIZES, strict=True)]
        for ours, theirs in zip(packed, alone, strict=True):
            assert theirs.std() > 0.1
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_perturbing_one_sample_leaves_the_others_exactly_unchanged(
    students: dict[str, DiT], recipe: str, name: str
) -> None:
    student, num_images = students[recipe].double(), 5
    pair = (batch(num_images, seed=0), batch(num_images, seed=1))
    before = student(*in_lists(*pair), patch_size=SIZES, packing=PACKINGS[name])
    for segment in range(2):
        for sample in range(num_images):
            x, t, y = in_lists(*pair)
            x[segment] = x[segment].clone()
            x[segment][sample] += 100 * torch.randn(4, 8, 8, dtype=torch.float64)
            after = student(x, t, y, patch_size=SIZES, packing=PACKINGS[name])
            changed = [
                (i, n) for i in range(2) for n in range(num_images) if not torch.equal(after[i][n], before[i][n])
            ]
            assert changed == [(segment, sample)]


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("sizes", [[4, 2], [2, 3], [3, 4], [4, 4], [2], [2, 4, 8]])
def test_other_sizes_orders_and_numbers_of_segments(students: dict[str, DiT], name: str, sizes: list[int]) -> None:
    """3 does not divide the latent, 9 of its tokens do not fill a row of 16, and equal lengths need no padding."""
    student = students["shared"].double()
    batches = [batch(3, seed) for seed in range(len(sizes))]
    packed = student(*in_lists(*batches), patch_size=sizes, packing=PACKINGS[name])
    for ours, b, size in zip(packed, batches, sizes, strict=True):
        torch.testing.assert_close(ours, student(*b, patch_size=size), atol=1e-12, rtol=1e-12)


def test_segments_may_differ_in_number_and_latent_size_unless_in_rows(students: dict[str, DiT]) -> None:
    student = students["lora"].double()
    batches = [batch(2), batch(5, 1, size=(12, 6))]
    for name in ("padded", "groups", "split"):
        packed = student(*in_lists(*batches), patch_size=SIZES, packing=PACKINGS[name])
        for ours, b, size in zip(packed, batches, SIZES, strict=True):
            torch.testing.assert_close(ours, student(*b, patch_size=size), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match=r"there are \[2, 5\]; pack groups"):
        student(*in_lists(*batches), patch_size=SIZES, packing=pack_rows)


def test_split_attention_is_what_a_list_gets(students: dict[str, DiT]) -> None:
    student = students["shared"].float()
    x, t, y = in_lists(*[(x.float(), t, y) for x, t, y in (batch(2), batch(2, 1))])
    default = student(x, t, y, patch_size=SIZES)
    assert all(map(torch.equal, default, student(x, t, y, patch_size=SIZES, packing=PACKINGS["split"])))


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_those_of_separate_calls(recipe: str, randomised: Randomise) -> None:
    """Also when the blocks run again during backward: which size a token has is an argument there, too."""

    def gradients(checkpointing: bool, packing: str) -> dict[str, Tensor]:
        student = flexify(create_model("DiT-Tiny/2", input_size=8, num_classes=10), [4], recipe=recipe, rank=2)  # type: ignore[arg-type]
        randomised(student).double().eval()
        student.gradient_checkpointing = checkpointing
        x, t, y = in_lists(batch(3), batch(3, 1))
        if packing == "separate":
            out = [student(x[i], t[i], y[i], patch_size=SIZES[i]) for i in range(2)]
        else:
            out = student(x, t, y, patch_size=SIZES, packing=PACKINGS[packing])
        sum(prediction.square().mean() for prediction in out).backward()  # type: ignore[union-attr]
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    expected = gradients(False, "separate")
    for name in PACKINGS:
        torch.testing.assert_close(gradients(True, name), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["split", "rows"])
def test_one_graph(students: dict[str, DiT], name: str) -> None:
    student, num_graphs = students["lora"].float(), 0

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(student, dynamic=False, fullgraph=True, backend=count)
    x, t, y = in_lists(*[(x.float(), t, y) for x, t, y in (batch(2), batch(2, 1))])
    for _ in range(2):
        packed = compiled(x, t, y, patch_size=SIZES, packing=PACKINGS[name])
        assert all(map(torch.equal, packed, student(x, t, y, patch_size=SIZES, packing=PACKINGS[name])))
    assert num_graphs == 1


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("num_images", [1, 5])
def test_price_is_what_a_counter_counts(name: str, num_images: int) -> None:
    """On meta tensors; unmerged adapters run at their own size, over its padding too."""
    with torch.device("meta"):
        target = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
        for student in (flexify(target, [4], size_norms=False), flexify(target, [4], recipe="lora", rank=4)):
            x, t, y = (
                [torch.empty(num_images, 4, 8, 8)] * 2,
                [torch.empty(num_images)] * 2,
                [torch.zeros(num_images).long()] * 2,
            )
            with FlopCounterMode(display=False) as counter:
                student.eval()(x, t, y, patch_size=SIZES, packing=PACKINGS[name])
            layout = PACKINGS[name]([Segment(size, num_images, size.num_tokens((8, 8))) for size in SIZES])
            priced = sum(
                batch_flops(student, size, num_images, layout.work(i), merged=False) for i, size in enumerate(SIZES)
            )
            assert priced == counter.get_total_flops() - projections(student)


def projections(student: DiT) -> int:
    """Of the shared (de)embedding to both sizes: not counted, since they depend on nothing but the weights."""
    with FlopCounterMode(display=False) as counter:
        for size in SIZES:
            student.x_embedder.weights(size)
            student.final_layer.linear.weights(size)
    return counter.get_total_flops()


def work(name: str, num_images: int) -> list[tuple[int, int, int]]:
    layout: TokenLayout = PACKINGS[name]([Segment(POWERFUL, num_images, 256), Segment(WEAK, num_images, 64)])
    each = (layout.work(i) for i in range(2))
    return [(w.num_sequences, w.num_tokens, w.num_keys) for w in each]


def test_the_four_layouts_of_the_paper() -> None:
    """Figure 12: sequences, tokens of each and keys of each query, conditional and guiding, for DiT-XL/2 at 256 px."""
    assert work("split", 5) == [(5, 256, 256), (5, 64, 64)]
    assert work("padded", 5) == [(5, 256, 256), (5, 256, 256)]
    assert work("rows", 5) == [(5, 256, 320), (5, 64, 320)]
    assert work("groups", 5) == [(5, 256, 256), (8, 64, 256)]
    assert work("groups", 4) == [(4, 256, 256), (4, 64, 256)]
    assert work("groups", 1) == [(1, 256, 256), (4, 64, 256)]


def test_groups_have_rows_of_the_long_length_and_fill_the_last_one() -> None:
    for num_images in range(1, 10):
        layout = pack_groups([Segment(POWERFUL, num_images, 256), Segment(WEAK, num_images, 64)])
        assert {rows.num_tokens for rows in layout.rows} == {256}
        assert layout.rows[1].num_rows == -(-num_images // 4) and layout.segments[1].num_sequences % 4 == 0


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_samples_and_price_under_a_sampler(students: dict[str, DiT], recipe: str, name: str) -> None:
    student = students[recipe].float()
    schedule = PatchSchedule.parse("4:2,2:2/4:3,2:1")
    options = {"schedule": schedule, "cfg_scale": 3.0, "solver": "ddim"}
    noise = torch.randn(3, 4, 8, 8)
    separate, packed = Sampler(student, **options), Sampler(student, **options, packing=name)  # type: ignore[arg-type]
    expected = separate([1, 2, 3], noise=noise, batch_size=2)
    torch.testing.assert_close(packed([1, 2, 3], noise=noise, batch_size=2), expected, atol=1e-4, rtol=1e-4)
    assert [replace(call, work=None) for call in packed.trace] == separate.trace
    assert [call.step for call in packed.trace if call.work] == [2, 2] * 2  # the steps with two sizes, both batches
    extra = {"padded": True, "rows": True, "groups": True, "split": False}[name]
    prices = [trace_cost(student, sampler.trace) for sampler in (packed, separate)]
    assert (prices[0].total > prices[1].total) == extra and prices[0].powerful_total == prices[1].powerful_total


def test_price_of_a_batch_by_itself_is_that_of_its_sequences() -> None:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    assert batch_flops(model, 4, 3) == 3 * forward_flops(model, 4) == batch_flops(model, 4, 3, BlockWork(3, 4, 4))


def test_what_cannot_be_packed_is_refused(students: dict[str, DiT]) -> None:
    merged = MergedModel(students["lora"].float())
    schedule = PatchSchedule.parse("2:2/4:2")
    with pytest.raises(ValueError, match="give packing='separate'"):
        Sampler(merged, schedule=schedule, packing="split")
    with pytest.raises(ValueError, match="unknown packing 'tight': give one of separate, padded"):
        Sampler(merged, schedule=schedule, packing="tight")  # type: ignore[arg-type]
    assert packing_of("separate") is None
