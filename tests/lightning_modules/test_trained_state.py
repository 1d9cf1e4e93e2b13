"""Checkpoints of adapters: as small as what trains, and not to be put on another base without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks.ema import EMA
from datamodules.captioned_digits import CaptionedDigitsDataModule
from flexidit import load_checkpoint
from flexidit.identity import base_hash
from lightning_modules import ClassConditional, Distillation, TextToImage
from lightning_modules.settings import FlexSettings, TargetSettings

Fit = Callable[..., pl.Trainer]
MakeTarget = Callable[..., TargetSettings]
LORA = FlexSettings([4], recipe="lora", rank=4)


def saved(fit: Fit, module: Distillation | ClassConditional, path: Path, **options: Any) -> dict[str, Any]:
    """The checkpoint of a short run."""
    is_text = isinstance(module, Distillation)
    fit(module, 2, has_captions=is_text, callbacks=[EMA(0.5)], **options).save_checkpoint(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", [TextToImage, ClassConditional])
def test_a_checkpoint_holds_what_trains_and_names_the_base(
    make_target: MakeTarget, fit: Fit, tmp_path: Path, kind: Any
) -> None:
    variant = "TextDiT-Tiny/2" if kind is TextToImage else "DiT-Tiny/2"
    target = make_target(variant, hidden_size=96, num_heads=4)
    checkpoint = saved(fit, module := kind(target, LORA), path := tmp_path / "last.ckpt")
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert checkpoint["state_dict"].keys() == trained.keys()
    assert checkpoint["flexidit"]["base"] == {"hash": base_hash(target.build()), "source": target.checkpoint}
    bytes_of_one = sum(p.numel() * p.element_size() for p in trained.values())
    tables = 300 * len(trained) * 4 + 40_000  # names, shapes, configs, loops, generators, padding
    # weights, their average, two moments
    assert 4 * bytes_of_one < path.stat().st_size < 4 * bytes_of_one + tables
    assert path.stat().st_size < 0.5 * Path(target.checkpoint or "").stat().st_size


def test_the_file_with_its_base_is_the_trained_student(make_target: MakeTarget, fit: Fit, tmp_path: Path) -> None:
    saved(fit, module := TextToImage(make_target(), LORA), path := tmp_path / "last.ckpt")
    loaded = load_checkpoint(path, prefer_ema=False).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in module.model.state_dict().items())


def test_training_on_from_adapters_names_their_base_and_not_them(
    make_target: MakeTarget, fit: Fit, tmp_path: Path
) -> None:
    """The file of the adapters may be the one that is written next."""
    target, path = make_target(), tmp_path / "last.ckpt"
    saved(fit, TextToImage(target, LORA), path)
    again = TextToImage(TargetSettings(checkpoint=str(path)), LORA)
    assert saved(fit, again, path)["flexidit"]["base"]["source"] == target.checkpoint
    loaded = load_checkpoint(path, prefer_ema=False).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in again.model.state_dict().items())


def test_a_base_that_nothing_else_holds_is_in_the_file(tiny_text: TargetSettings, fit: Fit, tmp_path: Path) -> None:
    checkpoint = saved(fit, module := TextToImage(tiny_text, LORA), path := tmp_path / "last.ckpt")
    assert checkpoint["flexidit"]["base"] is None
    assert checkpoint["state_dict"].keys() == {f"model.{name}" for name in module.model.state_dict()}
    fit(TextToImage(tiny_text, LORA), 3, has_captions=True, callbacks=[EMA(0.5)], ckpt_path=path)


def test_the_text_encoder_is_recorded(make_target: MakeTarget, fit: Fit, tmp_path: Path) -> None:
    text = saved(fit, TextToImage(make_target(), LORA), path := tmp_path / "last.ckpt")["flexidit"]["text"]
    assert text == {"class": "WordEncoder", "max_length": 16, "width": 64, "seed": 0}
    data = CaptionedDigitsDataModule(batch_size=16, caption_length=17)
    with pytest.raises(ValueError, match=r"data.text_encoder.max_length 16 -> 17"):
        fit(TextToImage(make_target(), LORA), 3, data=data, callbacks=[EMA(0.5)], ckpt_path=path)


def test_all_weights_are_in_the_file_where_all_train(make_target: MakeTarget, fit: Fit, tmp_path: Path) -> None:
    target = make_target("DiT-Tiny/2")
    checkpoint = saved(fit, module := ClassConditional(target, FlexSettings([4])), tmp_path / "last.ckpt")
    assert checkpoint["flexidit"]["base"] is None
    assert checkpoint["state_dict"].keys() == {f"model.{name}" for name in module.model.state_dict()}


@pytest.mark.parametrize("fault", ["another base", "no base", "unnamed base", "rank", "sizes", "lacks", "unknown"])
def test_what_does_not_belong_together_is_refused(
    make_target: MakeTarget, tiny_text: TargetSettings, fit: Fit, tmp_path: Path, fault: str
) -> None:
    checkpoint = saved(fit, TextToImage(make_target(), LORA), path := tmp_path / "last.ckpt")
    state, lost = checkpoint["state_dict"], "model.size_embedder.1x4x4"
    if fault == "unnamed base":
        checkpoint["flexidit"]["base"] = None
    elif fault == "lacks":
        del state[lost]
    elif fault == "unknown":
        state["model.more"] = state[lost]
    torch.save(checkpoint, path)
    target, flex, complaint = {
        "another base": (
            make_target(name="other", seed=1),
            LORA,
            r"belong to the base .*target.*but .*other.* another",
        ),
        "no base": (tiny_text, LORA, r"holds adapters of .*target.safetensors and not that base itself"),
        "unnamed base": (make_target(), LORA, "does not say which base its adapters belong to"),
        "rank": (make_target(), FlexSettings([4], recipe="lora", rank=8), r"flex.rank 4 -> 8, flex.alpha 4.0 -> 8.0"),
        "sizes": (
            make_target(),
            FlexSettings([8], recipe="lora", rank=4),
            r"weak_patch_sizes \['1x4x4'\] -> \['1x8x8'\]",
        ),
        "lacks": (make_target(), LORA, rf"differ in 1 of the tensors that train, it lacks {lost}"),
        "unknown": (make_target(), LORA, "it has unknown model.more"),
    }[fault]
    with pytest.raises(ValueError, match=complaint):
        fit(TextToImage(target, flex), 3, has_captions=True, ckpt_path=path)


def test_saving_in_the_middle_of_validation_keeps_the_raw_weights(
    make_target: MakeTarget, fit: Fit, tmp_path: Path
) -> None:
    """The average is in the model then; the base, which it does not touch, is not written either."""

    class Saving(TextToImage):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    options = {"limit_val_batches": 1, "val_check_interval": 2}
    after = saved(fit, Saving(make_target(), LORA), tmp_path / "after.ckpt", **options)["state_dict"]
    inside = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
    assert inside.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in inside.items())
