from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from flexidit import create_model, flexify
from flexidit.layouts.dit import config_to_diffusers, to_diffusers
from flexidit.models.dit import DiT

Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def batch() -> Batch:
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 10])


@pytest.mark.parametrize("depth", [1, 3])
def test_agrees_with_diffusers(depth: int, batch: Batch, randomised: Callable[..., nn.Module]) -> None:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10, depth=depth, frequency_shift=1, mlp_norm_eps=1e-5)
    randomised(model)
    peer = DiTTransformer2DModel(**config_to_diffusers(model.config))
    peer.load_state_dict(to_diffusers(model.state_dict(), depth))
    x, t, y = batch
    model.double().eval(), peer.double().eval()
    with torch.no_grad():
        ours, theirs = model(x.double(), t, y, patch_size=2), peer(x.double(), t, y).sample
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 9)])
@pytest.mark.parametrize("patch_size", [2, 3, 4, 8])
def test_output_has_the_inputs_size(size: tuple[int, int], patch_size: int) -> None:
    model = flexify(create_model("DiT-Tiny/2", input_size=size, num_classes=10), patch_sizes=[3, 4, 8])
    out = model(torch.randn(2, 4, *size), torch.tensor([1, 2]), torch.tensor([1, 2]), patch_size=patch_size)
    assert out.shape == (2, 8, *size)


def test_another_latent_size_than_the_configured_one(randomised: Callable[..., nn.Module]) -> None:
    """Positions are pixel coordinates: a model built for 8 x 8 computes on 12 x 12 what one built for 12 x 12 does."""
    small, large = (create_model("DiT-Tiny/2", input_size=side, num_classes=10).eval() for side in (8, 12))
    randomised(small), randomised(large)
    small, large = flexify(small, [4]).eval(), flexify(large, [4]).eval()
    x, t, y = torch.randn(2, 4, 12, 12), torch.tensor([1, 2]), torch.tensor([1, 2])
    for patch_size in (2, 4):
        torch.testing.assert_close(small(x, t, y, patch_size=patch_size), large(x, t, y, patch_size=patch_size))


def test_patch_size_is_a_keyword_without_default(batch: Batch) -> None:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    with pytest.raises(TypeError, match="patch_size"):
        model(*batch)
    with pytest.raises(ValueError, match="only 1x2x2; flexify"):
        model(*batch, patch_size=4)


def test_a_fresh_model_predicts_zero(batch: Batch) -> None:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    assert not model(*batch, patch_size=2).any()


def test_no_label_is_dropped_unasked(batch: Batch, randomised: Callable[..., nn.Module]) -> None:
    """Training or not: a teacher and its student must see the same labels."""
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10, class_dropout_prob=1.0)
    randomised(model)
    x, t, y = batch
    assert torch.equal(model.train()(x, t, y, patch_size=2), model.eval()(x, t, y, patch_size=2))
    assert not torch.equal(model(x, t, model.null_condition(y), patch_size=2)[:2], model(x, t, y, patch_size=2)[:2])


def test_the_null_label(batch: Batch) -> None:
    y = batch[2]
    assert create_model("DiT-Tiny/2", input_size=8, num_classes=10).null_condition(y).tolist() == [10, 10, 10]
    plain = create_model("DiT-Tiny/2", input_size=8, num_classes=10, class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="no null label"):
        plain.null_condition(y)


@pytest.mark.parametrize("recipe", ["shared", "lora"])
def test_one_graph_per_patch_size(recipe: str, batch: Batch) -> None:
    student = flexify(create_model("DiT-Tiny/2", input_size=8, num_classes=10), [4, 8], recipe=recipe, rank=2)  # type: ignore[arg-type]
    num_graphs = 0

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(student.eval(), dynamic=False, fullgraph=True, backend=count)
    for _ in range(3):
        for patch_size in (2, 4, 8):
            out = compiled(*batch, patch_size=patch_size)
            assert torch.equal(out, student(*batch, patch_size=patch_size))
    assert num_graphs == 3


def test_print_names_the_patch_sizes() -> None:
    text = repr(flexify(create_model("DiT-Tiny/2", input_size=8, num_classes=10), [4]))
    assert "patch_size=1x4x4, projected to 1x2x2" in text


def test_impossible_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        create_model("DiT-Tiny/2", num_heads=5)


def test_dit_is_what_create_model_returns() -> None:
    assert isinstance(create_model("DiT-Tiny/4", input_size=8), DiT)
