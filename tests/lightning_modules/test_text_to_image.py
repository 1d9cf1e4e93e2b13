"""The recipe of Table 5, as a config gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser

from flexidit import load_checkpoint
from flexidit.checkpoint import save_checkpoint
from lightning_modules import TextToImage
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

Fit = Callable[..., pl.Trainer]
MakeTarget = Callable[..., TargetSettings]


@pytest.mark.parametrize("weak", [[4], [4, 8]], ids=["one", "two"])
def test_it_runs(make_target: MakeTarget, fit: Fit, weak: list[int | str]) -> None:
    module = TextToImage(make_target(), FlexSettings(weak, recipe="lora", positions="corners"))
    fit(module, has_captions=True, fast_dev_run=2)
    assert module.step_flops > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_it_runs_in_any_precision(make_target: MakeTarget, fit: Fit, precision: str) -> None:
    """Lightning converts batches itself, and refuses to write into what is frozen."""
    module = TextToImage(make_target(), FlexSettings([4], recipe="lora", positions="corners"))
    trainer = fit(module, has_captions=True, max_steps=2, precision=precision)
    assert trainer.callback_metrics["train/loss"].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_a_base_in_half_precision_are_not(
    tmp_path: Path, fit: Fit, make_target: MakeTarget, dtype: Any
) -> None:
    half = tmp_path / "half.safetensors"
    save_checkpoint(load_checkpoint(str(make_target().checkpoint)).to(dtype), half)
    module = TextToImage(TargetSettings(checkpoint=str(half)), FlexSettings([4], recipe="lora", positions="corners"))
    fit(module, has_captions=True, max_steps=3, precision="bf16-mixed")
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and all(p.isfinite().all() for p in trained)


def test_a_model_of_labels_is_refused(make_target: MakeTarget) -> None:
    with pytest.raises(ValueError, match=r"the target is a DiT, which takes labels: .*Distillation"):
        TextToImage(make_target("DiT-Tiny/2")).configure_model()


def test_a_config_may_change_one_field_of_the_defaults() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextToImage, "model")
    given = {
        "target": {"variant": "TextDiT-Tiny/2"},
        "flex": {"rank": 64},
        "optimizer": {"lr": 1e-3},
        "timestep_ranges": "4:60,2:40",
    }
    parsed = parser.parse_object({"model": {"class_path": "lightning_modules.TextToImage", "init_args": given}})
    module = parser.instantiate_classes(parsed).model
    assert module.flex_settings == FlexSettings([4], recipe="lora", rank=64)
    assert module.optimizer_settings == OptimizerSettings(lr=1e-3, weight_decay=1e-2)
    module.configure_model()
    assert module.timesteps_of(module.model.patch_sizes[1]) == range(400, 1000)
