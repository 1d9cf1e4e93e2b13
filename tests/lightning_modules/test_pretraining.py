"""From scratch: plain, or flexible from the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from datamodules.captioned_digits import CaptionedDigitsDataModule
from datamodules.digits import DigitsDataModule
from flexidit import create_model, flops
from flexidit.checkpoint import save_checkpoint
from lightning_modules import Pretraining
from lightning_modules.settings import FlexSettings, TargetSettings

Fit = Callable[..., pl.Trainer]


@pytest.mark.parametrize("flex", [None, FlexSettings([4]), FlexSettings([4, 8])], ids=["plain", "one", "two"])
def test_it_runs(tiny: TargetSettings, fit: Fit, flex: FlexSettings | None) -> None:
    module = Pretraining(tiny, flex)
    fit(module, fast_dev_run=2)
    assert module.step_flops == 3 * flops.forward_flops(module.model, module.patch_size_at(1))


def test_fresh_weights_follow_from_the_seed(tiny: TargetSettings) -> None:
    def start(seed: int) -> torch.Tensor:
        torch.rand(1)  # whatever happened before
        module = Pretraining(tiny, seed=seed)
        module.configure_model()
        return module.model.blocks[0].attn.qkv.weight

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


def test_positions_do_not_train(tiny: TargetSettings, tmp_path: Path) -> None:
    model = create_model(tiny.variant or "", **tiny.overrides)
    path = save_checkpoint(model, tmp_path / "model.pt", layout_format="official")
    module = Pretraining(TargetSettings(tiny.variant, tiny.overrides, str(path)))
    module.configure_model()
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.pos_embed"]


def test_adapters_of_random_weights_are_refused(tiny: TargetSettings) -> None:
    with pytest.raises(ValueError, match="use 'shared'"):
        Pretraining(tiny, FlexSettings([4], recipe="lora")).configure_model()


@pytest.mark.parametrize("flex", [None, FlexSettings([4])], ids=["plain", "flexible"])
def test_it_runs_with_captions(tiny_text: TargetSettings, fit: Fit, flex: FlexSettings | None) -> None:
    module = Pretraining(tiny_text, flex)
    trainer = fit(module, 3, has_captions=True, precision="bf16-mixed", limit_val_batches=1, val_check_interval=3)
    assert module.step_flops == 3 * flops.forward_flops(module.model, module.patch_size_at(2))
    assert {"val/loss_1x2x2"} <= set(trainer.callback_metrics)


def test_captions_are_dropped_for_those_of_the_data_where_the_model_has_none(
    tiny_text: TargetSettings, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {**tiny_text.overrides, "null_caption": False, "class_dropout_prob": 0.5}
    module = Pretraining(TargetSettings(tiny_text.variant, overrides))
    module.configure_model()
    seen: list[Any] = []
    embed = module.model.embed_condition
    monkeypatch.setattr(module.model, "embed_condition", lambda t, y, size: seen.append(y) or embed(t, y, size))
    data = CaptionedDigitsDataModule(batch_size=64)
    fit(module, 1, data=data)
    empty = data.null_captions
    dropped = seen[0].mask.sum(dim=1) == 1  # the end token alone
    assert 0.3 < dropped.float().mean() < 0.7
    visible = empty.mask[0]
    assert all(torch.equal(row[visible], empty.embeddings[0, visible]) for row in seen[0].embeddings[dropped])


def test_without_any_null_caption_none_can_be_dropped(tiny_text: TargetSettings, fit: Fit) -> None:
    class Bare(DigitsDataModule):
        num_classes = None  # type: ignore[assignment]

    target = TargetSettings(tiny_text.variant, {**tiny_text.overrides, "null_caption": False})
    with pytest.raises(ValueError, match="these weights have no null caption and the data have no null_captions"):
        fit(Pretraining(target), data=Bare())


def test_labels_for_a_model_of_captions_are_refused(tiny_text: TargetSettings, fit: Fit) -> None:
    with pytest.raises(ValueError, match="the data have labels, the model takes captions"):
        fit(Pretraining(tiny_text))
