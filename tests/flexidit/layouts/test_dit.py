from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexidit import create_model
from flexidit.layouts.dit import config_from_official, from_diffusers, to_diffusers


@pytest.fixture(scope="module")
def published(test_data: Path) -> dict[str, dict[str, Tensor]]:
    """Every name and shape of the public checkpoints, without their values."""
    entries = json.loads((test_data / "state_dict_keys.json").read_text())
    return {
        name: {key: torch.empty(shape, device="meta") for key, shape in entry["keys"].items()}
        for name, entry in entries.items()
    }


@pytest.mark.parametrize(
    ("name", "input_size"),
    [("DiT-XL-2-256 (facebookresearch/DiT)", 32), ("DiT-XL-2-512", 64), ("SiT-XL-2-256", 32)],
)
def test_public_checkpoints_load_strictly(published: dict[str, dict[str, Tensor]], name: str, input_size: int) -> None:
    state = published[name]
    with torch.device("meta"):
        model = create_model("DiT-XL/2", input_size=input_size)
    model.load_state_dict(state, strict=True, assign=True)
    assert config_from_official(state) == model.config


def test_diffusers_names_and_shapes_are_ours_both_ways(published: dict[str, dict[str, Tensor]]) -> None:
    theirs = published["diffusers DiTTransformer2DModel XL/2 256"]
    ours = published["DiT-XL-2-256 (facebookresearch/DiT)"]
    converted = from_diffusers(theirs, depth=28)
    assert {n: v.shape for n, v in converted.items()} == {n: v.shape for n, v in ours.items() if n != "pos_embed"}
    back = to_diffusers(ours, depth=28)
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in theirs.items()}


def test_round_trip_is_exact() -> None:
    state = create_model("DiT-Tiny/2", input_size=8, num_classes=10).state_dict()
    back = from_diffusers(to_diffusers(state, 2), 2)
    assert set(back) == set(state) - {"pos_embed"}
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_unequal_label_tables_are_refused() -> None:
    theirs = to_diffusers(create_model("DiT-Tiny/2", input_size=8, num_classes=10).state_dict(), 2)
    theirs["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] += 1
    with pytest.raises(ValueError, match="different class_embedder"):
        from_diffusers(theirs, 2)


def test_what_shapes_cannot_tell_must_be_given() -> None:
    state = create_model("DiT-Tiny/2", input_size=8, num_classes=10).state_dict()
    with pytest.raises(ValueError, match="give num_heads"):
        config_from_official(state)
    assert config_from_official(state, num_heads=4).depth == 2
    with pytest.raises(ValueError, match="not a DiT's"):
        config_from_official({"weight": torch.zeros(1)})
