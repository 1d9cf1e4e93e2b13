"""Option groups: what they build, and which mistakes they name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from flexidit import create_model
from flexidit.checkpoint import save_checkpoint
from lightning_modules.settings import TABLE_5, MatchingSettings, OptimizerSettings, TargetSettings

TINY = {"input_size": 8, "in_channels": 1, "num_classes": 10}


def test_the_optimizer_defaults_are_those_of_table_4() -> None:
    optimizer, schedule = OptimizerSettings().build([nn.Parameter(torch.zeros(1))], max_steps=0)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 0.0)
    assert schedule.lr_lambdas[0](10**6) == 1.0


def test_those_of_distillation_are_table_5() -> None:
    optimizer, _ = TABLE_5.build([nn.Parameter(torch.zeros(1))], max_steps=0)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (8e-4, 1e-2)


def test_the_cosine_rises_linearly_and_ends_at_zero() -> None:
    factor = OptimizerSettings(warmup_steps=4, decay="cosine").factor(100)
    assert factor(1) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.01)))
    assert factor(50) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("max_steps", [-1, 0, math.inf])
def test_a_cosine_needs_an_end(max_steps: float) -> None:
    with pytest.raises(ValueError, match=r"needs trainer.max_steps"):
        OptimizerSettings(decay="cosine").factor(max_steps)


def test_a_target_is_the_variant_with_the_checkpoint_s_weights(tmp_path: Path) -> None:
    model = create_model("DiT-Tiny/2", **TINY)
    path = save_checkpoint(model, tmp_path / "target.safetensors")
    built = TargetSettings("DiT-Tiny/2", TINY, str(path)).build()
    assert built.training
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_checkpoint_of_another_model_than_the_variant_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(create_model("DiT-Tiny/2", **TINY), tmp_path / "target.safetensors")
    with pytest.raises(ValueError, match=r"has num_classes=10, but target.variant and target.overrides say 1000"):
        TargetSettings("DiT-Tiny/2", {**TINY, "num_classes": 1000}, str(path)).build()


def test_a_checkpoint_of_another_family_or_scale_is_refused(tmp_path: Path) -> None:
    model = create_model("TextDiT-Tiny/2", input_size=8, hidden_size=32, num_heads=2)
    path = str(save_checkpoint(model, tmp_path / "text.safetensors"))
    with pytest.raises(ValueError, match=r"holds a TextDiT, but target.variant is a DiT"):
        TargetSettings("DiT-Tiny/2", {}, path).build()
    given = {"input_size": 8, "hidden_size": 32, "num_heads": 2, "position_scale": 2.0}
    with pytest.raises(ValueError, match=r"has position_scale=1.0, but .* say 2.0"):
        TargetSettings("TextDiT-Tiny/2", given, path).build()


def test_official_pixart_weights_are_told_what_they_do_not_tell(tmp_path: Path) -> None:
    fields = {"input_size": 8, "hidden_size": 48, "num_heads": 3, "caption_length": 7, "null_caption": False}
    model = create_model("TextDiT-Tiny/2", **fields)
    state = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    torch.save(state, path := tmp_path / "pixart.pth")
    built = TargetSettings("TextDiT-Tiny/2", fields, str(path)).build()
    assert built.config == model.config


def test_the_dropout_of_a_checkpoint_can_be_changed_and_nothing_else(tmp_path: Path) -> None:
    path = str(save_checkpoint(create_model("DiT-Tiny/2", **TINY), tmp_path / "target.safetensors"))
    built = TargetSettings(checkpoint=path, overrides={"class_dropout_prob": 0.0}).build()
    assert built.config.class_dropout_prob == 0.0
    with pytest.raises(ValueError, match=r"overrides depth change a variant: give target.variant too"):
        TargetSettings(checkpoint=path, overrides={"depth": 3}).build()


def test_a_target_needs_a_name_or_weights() -> None:
    with pytest.raises(ValueError, match=r"set target.variant, target.checkpoint"):
        TargetSettings().build()


def test_the_chain_is_two_steps_of_each_size_unless_given() -> None:
    sizes = create_model("DiT-Tiny/2").patch_sizes
    assert [size.name for size in MatchingSettings().plan([*sizes, "4"])] == ["1x4x4"] * 2 + ["1x2x2"] * 2
    assert [size.name for size in MatchingSettings(chain={"2": 1, "4": 2}).plan(sizes)] == ["1x4x4"] * 2 + ["1x2x2"]
