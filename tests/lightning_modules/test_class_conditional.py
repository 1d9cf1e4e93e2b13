"""Fine-tuning a flexible student: who trains, and when the matching loss is there."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from flexidit import create_model, flexify
from flexidit.checkpoint import save_checkpoint
from flexidit.recipes import added_parameters
from lightning_modules import ClassConditional
from lightning_modules.settings import FlexSettings, MatchingSettings, TargetSettings

Fit = Callable[..., pl.Trainer]
MATCHING = MatchingSettings(weight=0.5, chain={"4": 1, "2": 1}, num_timesteps=50)


class Gradients(Callback):
    """Names of the parameters with a gradient at each optimizer step."""

    def __init__(self) -> None:
        self.names: list[set[str]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.names.append({name for name, p in pl_module.named_parameters() if p.grad is not None})


class Total(Callback):
    """What was minimised in the last step."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.value = outputs["loss"].item()


def first_row(path: Path) -> dict[str, str]:
    """The values that a logger wrote at the first step."""
    with path.open() as file:
        return {key: value for row in csv.DictReader(file) for key, value in row.items() if value}


@pytest.fixture
def target(tiny: TargetSettings, tmp_path: Path, randomised: Callable[..., torch.nn.Module]) -> TargetSettings:
    """Weights of a model that predicts something: a fresh one outputs zero, and stops most gradients."""
    model = randomised(create_model(tiny.variant or "", **tiny.overrides))
    return TargetSettings(checkpoint=str(save_checkpoint(model, tmp_path / "target.safetensors")))


@pytest.mark.parametrize("recipe", ["shared", "lora"])
@pytest.mark.parametrize("matching", [MatchingSettings(), MATCHING], ids=["plain", "matching"])
def test_both_recipes_run(target: TargetSettings, fit: Fit, recipe: Any, matching: MatchingSettings) -> None:
    module = ClassConditional(target, FlexSettings([4], recipe=recipe), matching)
    fit(module, fast_dev_run=2, limit_val_batches=1)
    assert module.step_flops > 0


def test_the_lora_recipe_trains_the_weak_size_and_nothing_else(target: TargetSettings, fit: Fit) -> None:
    fit(module := ClassConditional(target, FlexSettings([4], recipe="lora")), callbacks=[watch := Gradients()])
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert watch.names == [trained] * 3
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == added_parameters(module.model)[0]
    base = create_model("DiT-Tiny/2", **{k: getattr(module.model.config, k) for k in ("depth", "hidden_size")})
    assert not any(name.removeprefix("model.") in base.state_dict() for name in trained)


def test_a_shared_step_trains_all_that_its_size_uses(target: TargetSettings, fit: Fit) -> None:
    fit(module := ClassConditional(target), max_steps=6, callbacks=[watch := Gradients()])
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    own = {size: {name for name in trained if size in name} for size in ("1x2x2", "1x4x4")}
    assert own["1x2x2"]
    assert own["1x4x4"]
    for step, names in enumerate(watch.names):
        other = "1x2x2" if module.patch_size_at(step).name == "1x4x4" else "1x4x4"
        assert names == trained - own[other]
    assert set.union(*watch.names) == trained


def test_matching_reaches_the_powerful_size_or_as_far_as_asked(target: TargetSettings, fit: Fit) -> None:
    def trained_by(backprop_steps: int | None) -> set[str]:
        module = ClassConditional(target, matching=MatchingSettings(**{**vars(MATCHING), "weight": 1.0}))
        module.matching.backprop_steps = backprop_steps
        fit(module, max_steps=1)
        module.zero_grad()
        module.matching_loss({"x": torch.randn(8, 1, 8, 8), "y": torch.arange(8)}, 0).backward()
        return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}

    assert not any("1x4x4" in name for name in trained_by(None))
    assert any("1x4x4" in name for name in trained_by(2))


def test_the_matching_loss_starts_and_pauses_as_configured(target: TargetSettings, fit: Fit) -> None:
    settings = MatchingSettings(**{**vars(MATCHING), "start_step": 3, "every_n_steps": 2})
    matched: list[int] = []

    class Watched(ClassConditional):
        def matching_loss(self, batch: Any, batch_idx: int) -> Tensor:
            matched.append(self.global_step)
            return super().matching_loss(batch, batch_idx)

    fit(Watched(target, matching=settings), max_steps=8)
    assert matched == [4, 6]


def test_the_matching_loss_adds_to_the_loss(target: TargetSettings, fit: Fit, tmp_path: Path) -> None:
    totals, logged = [], []
    for weight in (0.0, 2.0):
        settings = MatchingSettings(**{**vars(MATCHING), "weight": weight})
        logger = CSVLogger(tmp_path, name=f"weight-{weight}", version="")
        module = ClassConditional(target, matching=settings)
        fit(module, max_steps=1, callbacks=[total := Total()], logger=logger, log_every_n_steps=1)
        totals.append(total.value)
        row = first_row(tmp_path / f"weight-{weight}" / "metrics.csv")
        logged.append({name: float(value) for name, value in row.items()})
    assert logged[0]["train/loss"] == logged[1]["train/loss"] == totals[0]  # DiT's loss alone
    assert "train/mmd" not in logged[0]
    assert totals[1] == pytest.approx(totals[0] + 2 * logged[1]["train/mmd"], rel=1e-5)


def test_what_falls_between_two_logging_steps_is_logged_as_a_mean(
    target: TargetSettings, fit: Fit, tmp_path: Path
) -> None:
    matching = MatchingSettings(**{**vars(MATCHING), "every_n_steps": 4})  # steps 0, 4, 8; logging steps 4, 9
    logged = {}
    for interval in (1, 5):
        logger = CSVLogger(tmp_path, name=f"every-{interval}", version="")
        fit(ClassConditional(target, matching=matching), 10, logger=logger, log_every_n_steps=interval)
        with (tmp_path / f"every-{interval}" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/mmd"]]
        logged[interval] = {int(row["step"]): float(row["train/mmd"]) for row in rows}
    each, windows = logged[1], logged[5]
    assert list(each) == [0, 4, 8]
    assert windows == pytest.approx({4: (each[0] + each[4]) / 2, 9: each[8]})


def test_the_base_size_starts_as_the_target(target: TargetSettings) -> None:
    module = ClassConditional(target)
    module.configure_model()
    original = target.build().eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 9])
    with torch.no_grad():
        ours = module.model.eval()(x, t, y, patch_size=2)
        torch.testing.assert_close(ours, original(x, t, y, patch_size=2), rtol=1e-5, atol=1e-5)


def test_a_flexible_checkpoint_goes_on_training(tiny: TargetSettings, fit: Fit, tmp_path: Path) -> None:
    student = flexify(create_model(tiny.variant or "", **tiny.overrides), [4])
    path = str(save_checkpoint(student, tmp_path / "student.safetensors"))
    fit(ClassConditional(TargetSettings(checkpoint=path), FlexSettings([4])), max_steps=1)
    with pytest.raises(ValueError, match=r"flexible already .*asks for recipe 'shared' and 1x8x8"):
        ClassConditional(TargetSettings(checkpoint=path), FlexSettings([8])).configure_model()


def test_impossible_chains_are_refused_before_training(tiny: TargetSettings) -> None:
    with pytest.raises(ValueError, match="no patch size 1x8x8"):
        ClassConditional(tiny, matching=MatchingSettings(1.0, chain={"8": 1, "2": 1})).configure_model()
    with pytest.raises(ValueError, match="backprop_steps is 1 to 2"):
        ClassConditional(tiny, matching=MatchingSettings(**{**vars(MATCHING), "backprop_steps": 3})).configure_model()


def test_a_batch_too_small_to_split_is_refused(tiny: TargetSettings, fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"needs 2 samples a process or more, got 1: raise data.batch_size"):
        fit(ClassConditional(tiny, matching=MATCHING), batch_size=1)
