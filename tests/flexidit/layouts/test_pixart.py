from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from flexidit import create_model, flexify
from flexidit.conditions import Captions
from flexidit.layouts.pixart import (
    NULL_CAPTION,
    config_from_diffusers,
    config_from_official,
    config_to_diffusers,
    from_diffusers,
    own_unit,
    to_diffusers,
)
from flexidit.models import TextDiT
from flexidit.recipes import plain_copy

TINY: dict[str, Any] = {"input_size": 8, "hidden_size": 48, "num_heads": 4, "caption_channels": 40}
T = torch.tensor([10, 800])


@pytest.fixture(scope="module")
def published(test_data: Path) -> dict[str, dict[str, Tensor]]:
    """Every name and shape of the public checkpoints, without their values."""
    entries = json.loads((test_data / "state_dict_keys.json").read_text())
    return {
        name: {key: torch.empty(shape, device="meta") for key, shape in entry["keys"].items()}
        for name, entry in entries.items()
        if "PixArt" in name
    }


@pytest.fixture
def official(published: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return published['PixArt-alpha XL/2 256 (original .pth, under ["state_dict"])']


def on_meta(name: str, **overrides: Any) -> TextDiT:
    with torch.device("meta"):
        model = create_model(name, **overrides)
    assert isinstance(model, TextDiT)
    return model


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def test_the_public_checkpoint_loads_strictly(official: dict[str, Tensor]) -> None:
    model = on_meta("PixArt-XL/2-256")
    model.load_state_dict(official, strict=True, assign=True)
    assert config_from_official(official) == model.config


def test_diffusers_names_and_shapes_are_ours_both_ways(published: dict[str, dict[str, Tensor]]) -> None:
    theirs = published["diffusers PixArtTransformer2DModel XL/2 512"]
    model = on_meta("PixArt-XL/2-512", null_caption=False)
    converted = from_diffusers(theirs, depth=28)
    model.load_state_dict({**converted, "pos_embed": model.pos_embed}, strict=True, assign=True)
    assert shapes(to_diffusers(model.state_dict(), depth=28)) == shapes(theirs)


@pytest.mark.parametrize("name", ["PixArt-XL/2-256", "PixArt-XL/2-512", "PixArt-XL/2-1024"])
def test_diffusers_class_has_the_names_shapes_and_config_of_ours(name: str) -> None:
    ours = on_meta(name)
    with torch.device("meta"):
        peer = PixArtTransformer2DModel(**config_to_diffusers(ours.config))
    assert shapes(to_diffusers(ours.state_dict(), 28)) == shapes(peer.state_dict())
    again = config_from_diffusers(peer.config)
    assert again == replace(ours.config, null_caption=False)
    told_less = {**peer.config, "interpolation_scale": None, "use_additional_conditions": None}
    assert config_from_diffusers(told_less) == again


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("scale", [1, 2])
def test_outputs_are_those_of_diffusers(micro: bool, scale: int) -> None:
    peer = PixArtTransformer2DModel(
        4, 12, num_layers=2, cross_attention_dim=48, caption_channels=40, sample_size=8, in_channels=4, out_channels=8,
        interpolation_scale=scale, use_additional_conditions=micro,
    ).eval()  # fmt: skip
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = TextDiT(config_from_diffusers(peer.config)).eval()
    state = from_diffusers(peer.state_dict(), 2)
    assert model.load_state_dict(state, strict=False).missing_keys == ["pos_embed"]
    for (height, width), num_tokens in (((8, 8), 5), ((8, 8), 1), ((6, 10), 12), ((12, 8), 7)):
        x, y = torch.randn(2, 4, height, width), captions(num_tokens)
        pixels = {"resolution": torch.tensor([[8.0 * height, 8.0 * width]] * 2)}
        pixels["aspect_ratio"] = torch.tensor([[height / width]] * 2)
        added = pixels if micro else None
        with torch.no_grad():
            theirs = peer(x, y.embeddings, T, added, encoder_attention_mask=y.mask.float()).sample
            for condition in (y, model.prepare(y)):
                ours = model(x, T, condition, patch_size=2)
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def captions(num_tokens: int) -> Captions:
    mask = torch.ones(2, num_tokens, dtype=torch.bool)
    mask[1, num_tokens // 2 + 1 :] = False
    return Captions(torch.randn(2, num_tokens, 40), mask)


@pytest.mark.parametrize("micro", [False, True])
def test_round_trips_are_exact(micro: bool, randomised: Callable[..., nn.Module]) -> None:
    model = create_model("TextDiT-Tiny/2", **TINY, micro_conditions=micro)
    randomised(model)
    state = model.state_dict()
    back = from_diffusers(to_diffusers(state, 2), 2)
    assert set(back) == set(state) - {"pos_embed", NULL_CAPTION}
    assert all(torch.equal(back[name], state[name]) for name in back)
    config = config_from_diffusers(config_to_diffusers(model.config))
    assert config == replace(model.config, null_caption=False, caption_length=120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0])
def test_the_scale_of_positions_is_read_off_their_table(scale: float, dtype: torch.dtype) -> None:
    model = create_model("TextDiT-Tiny/2", **TINY, position_scale=scale).to(dtype)
    assert config_from_official(model.state_dict(), num_heads=4) == model.config


def test_a_table_of_no_sines_was_learned(randomised: Callable[..., nn.Module]) -> None:
    model = create_model("TextDiT-Tiny/2", **TINY, position_table="learned", qk_norm=True, learn_sigma=False)
    randomised(model)
    assert config_from_official(model.state_dict()) == model.config  # the norm of queries tells the heads


def test_without_positions_the_1024_px_model_gives_itself_away(official: dict[str, Tensor]) -> None:
    large = on_meta("PixArt-XL/2-1024")
    state = large.state_dict()
    del state["pos_embed"]
    assert config_from_official(state) == large.config
    assert config_from_official(state, position_scale=1.0).position_scale == 1.0
    rest = {name: tensor for name, tensor in official.items() if name != "pos_embed"}
    with pytest.raises(ValueError, match="give input_size"):
        config_from_official(rest)
    assert config_from_official(rest, input_size=(64, 64)) == on_meta("PixArt-XL/2-512").config


def test_without_a_null_caption_there_is_none() -> None:
    model = create_model("TextDiT-Tiny/2", **TINY, null_caption=False, caption_length=120)
    assert config_from_official(model.state_dict(), num_heads=4) == model.config


def test_weak_patches_at_corners_are_indices_at_half_the_scale() -> None:
    student = flexify(create_model("TextDiT-Tiny/2", **TINY), [4], recipe="lora", rank=2, positions="corners")
    weak = plain_copy(student, 4)
    assert own_unit(weak.config).position_scale == 0.5
    assert own_unit(weak.config).position_unit is None
    alone = TextDiT(own_unit(weak.config))
    for size in ((8, 8), (12, 8), (20, 16)):
        torch.testing.assert_close(
            alone.positions(weak.base_patch_size, size), weak.positions(weak.base_patch_size, size)
        )
    assert config_from_official(weak.state_dict(), num_heads=4) == own_unit(weak.config)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"qk_norm": True}, "normalises queries"),
        ({"position_table": "learned"}, "positions are learned"),
        ({"input_size": (8, 16)}, "8x16"),
        ({"patch_size": "1x2x4"}, "1x2x4 is not square"),
        ({"patch_size": 3}, "whole patches"),
        ({"mlp_ratio": 2.0}, "mlp_ratio is 2"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config_to_diffusers(on_meta("TextDiT-Tiny/2", **{**TINY, **overrides}).config)


def test_patches_at_their_centres_and_several_sizes_are_refused() -> None:
    student = flexify(create_model("TextDiT-Tiny/2", **TINY), [4], recipe="lora", rank=2)
    with pytest.raises(ValueError, match="one patch size"):
        config_to_diffusers(student.config)
    with pytest.raises(ValueError, match="sit at their centres"):
        config_to_diffusers(plain_copy(student, 4).config)


def test_foreign_weights_are_named(official: dict[str, Tensor]) -> None:
    compressed = {**official, "blocks.14.attn.sr.weight": torch.empty(1152, 1, 2, 2, device="meta")}
    with pytest.raises(ValueError, match="kv-compress"):
        config_from_official(compressed)
    whole_norm = {**official, "blocks.0.attn.q_norm.weight": torch.empty(1152, device="meta")}
    with pytest.raises(ValueError, match="head by head"):
        config_from_official(whole_norm)
    with pytest.raises(ValueError, match="give num_heads"):
        config_from_official(create_model("TextDiT-Tiny/2", **TINY).state_dict())
    with pytest.raises(ValueError, match=r"no square; give input_size as \(H, W\)"):
        config_from_official(on_meta("PixArt-XL/2-256", input_size=(32, 64)).state_dict())


@pytest.mark.parametrize(
    ("argument", "value"),
    [("norm_eps", 1e-5), ("cross_attention_dim", 64), ("activation_fn", "geglu"), ("caption_channels", None)],
)
def test_foreign_arguments_of_diffusers_are_named(argument: str, value: Any) -> None:
    values = config_to_diffusers(on_meta("TextDiT-Tiny/2", **TINY).config)
    with pytest.raises(ValueError, match=argument):
        config_from_diffusers({**values, argument: value})
