"""From scratch: plain, or flexible from the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

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
