"""A resume with other settings: refused by name, or accepted and then really those of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.ema import EMA
from datamodules.captioned_digits import CaptionedDigitsDataModule
from datamodules.digits import DigitsDataModule
from datamodules.moving_digits import MovingDigitsDataModule
from lightning_modules import ClassConditional, Distillation, Pretraining, TextToImage
from lightning_modules.run_settings import differences
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings

Fit = Callable[..., pl.Trainer]
SHARED = FlexSettings([4])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of two steps of fine-tuning."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EMA(0.5)], limit_val_batches=0, default_root_dir=folder,
        gradient_clip_val=0.5,
    )  # fmt: skip
    trainer.fit(module(), DigitsDataModule(batch_size=16))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def target(**overrides: Any) -> TargetSettings:
    sizes = {"input_size": 8, "in_channels": 1, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 10}
    return TargetSettings("DiT-Tiny/2", {**sizes, **overrides})


def module(flex: FlexSettings = SHARED, lr: float = 1e-3, seed: int = 0, **options: Any) -> ClassConditional:
    overrides = options.pop("overrides", {})
    optimizer = OptimizerSettings(lr, **options.pop("optimizer", {}))
    return ClassConditional(target(**overrides), flex, optimizer=optimizer, seed=seed, **options)


def resume(fit: Fit, saved: Path, changes: dict[str, Any], max_steps: int = 3) -> pl.Trainer:
    """With the settings of the fixture, and some changes."""
    changes = dict(changes)
    allows, callbacks = changes.pop("allows", False), changes.pop("callbacks", [EMA(0.5)])
    data = DigitsDataModule(**{"batch_size": 16, **changes.pop("data", {})})
    trainer = {"gradient_clip_val": 0.5, **changes.pop("trainer", {})}
    kind = changes.pop("kind", module)
    resumed = kind(**changes)
    resumed.allows_changes = allows
    return fit(resumed, max_steps, data=data, callbacks=callbacks, ckpt_path=saved, **trainer)


OF_THE_COURSE = {
    "lr": ({"lr": 0.01}, "model.optimizer.lr 0.001 -> 0.01"),
    "decay": ({"optimizer": {"decay": "cosine"}}, "model.optimizer.decay constant -> cosine, trainer.max_steps"),
    "seed": ({"seed": 1}, "model.seed 0 -> 1"),
    "weights": (
        {"patch_size_weights": {"4": 1.0}}, "model.patch_size_weights none -> 4 1.0"),
    "loss": ({"matching": MatchingSettings(0.5)}, "model.matching none -> weight 0.5 start_step 0"),
    "dropout": ({"overrides": {"class_dropout_prob": 0.5}}, "model.class_dropout_prob 0.1 -> 0.5"),
    "kind": (
        {"kind": lambda: Pretraining(target(), SHARED, OptimizerSettings(1e-3))}, "model.class ClassCond.* -> Pretrai"),
    "data seed": ({"data": {"seed": 1}}, "data.seed 0 -> 1"),
    "data size": ({"data": {"val_fraction": 0.5}}, "data.val_fraction 0.1 -> 0.5"),
    "batch": (
        {"data": {"batch_size": 8}},
        r"global batch 16 \(data.batch_size 16 x 1 processes x accumulate_grad_batches 1\) -> 8 \(data.batch_size 8 x"),
    "accumulation": ({"trainer": {"accumulate_grad_batches": 2}}, r"global batch 16 \(.*\) -> 32 \("),
    "precision": ({"trainer": {"precision": "bf16-mixed"}}, "trainer.precision 32-true -> bf16-mixed"),
    "clipping": ({"trainer": {"gradient_clip_val": 1.0}}, "trainer.gradient_clip_val 0.5 -> 1.0"),
    "average": ({"callbacks": [EMA(0.9)]}, "callbacks.EMA.decay 0.5 -> 0.9"),
    "no average": ({"callbacks": []}, "callbacks.EMA decay 0.5 every_n_steps 1 warmup False -> none"),
}  # fmt: skip


@pytest.mark.parametrize("change", OF_THE_COURSE)
def test_another_course_is_refused_by_name(fit: Fit, saved: Path, change: str) -> None:
    changes, named = OF_THE_COURSE[change]
    with pytest.raises(ValueError, match=f"a run with other settings .*{named}.* with --resume.allow"):
        resume(fit, saved, changes)


def test_all_differences_are_named_and_nothing_else(fit: Fit, saved: Path) -> None:
    changes = {"lr": 0.01, "seed": 1, "data": {"seed": 1}}
    with pytest.raises(ValueError) as refused:
        resume(fit, saved, changes)
    inside = str(refused.value).partition("(")[2].partition(")")[0]
    assert inside.split(", ") == ["model.optimizer.lr 0.001 -> 0.01", "model.seed 0 -> 1", "data.seed 0 -> 1"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"data": {"num_workers": 1}},
        {"trainer": {"limit_val_batches": 1, "val_check_interval": 1, "log_every_n_steps": 7}},
    ],
)
def test_what_leaves_the_course_alone_is_free(fit: Fit, saved: Path, changes: dict[str, Any]) -> None:
    assert resume(fit, saved, changes, max_steps=4).global_step == 4


def test_with_a_cosine_the_length_of_the_run_is_part_of_its_course(fit: Fit, tmp_path: Path) -> None:
    cosine = {"optimizer": {"decay": "cosine"}}
    options: dict[str, Any] = {"callbacks": [EMA(0.5)], "gradient_clip_val": 0.5}
    fit(module(**cosine), 2, **options).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="trainer.max_steps 2 -> 3"):
        resume(fit, tmp_path / "last.ckpt", cosine)


def test_allowed_changes_are_told_and_have_an_effect(fit: Fit, saved: Path) -> None:
    changes = {"lr": 0.25, "optimizer": {"weight_decay": 0.5, "warmup_steps": 4}, "data": {"seed": 1}, "allows": True}
    with pytest.warns(UserWarning, match="goes on with changed settings, .*: model.optimizer.lr 0.001"):
        trainer = resume(fit, saved, changes)
    group = trainer.optimizers[0].param_groups[0]
    assert (group["initial_lr"], group["weight_decay"]) == (0.25, 0.5)
    assert math.isclose(group["lr"], 0.25 * 4 / 4)  # the warm-up's factor of step 3, where the next one would be
    assert trainer.global_step == 3


def test_allowing_changes_without_any_changes_nothing(fit: Fit, saved: Path) -> None:
    plain, allowed = (resume(fit, saved, {"allows": allows}, 5).lightning_module for allows in (False, True))
    pairs = zip(plain.parameters(), allowed.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"flex": FlexSettings([8])}, r"flex.weak_patch_sizes \['1x4x4'\] -> \['1x8x8'\], flex.underlying_patch_size"),
        ({"flex": FlexSettings([4], recipe="lora", rank=4)}, "flex.recipe shared -> lora"),
        ({"flex": FlexSettings([4], positions="grid")}, "flex.positions coords -> grid"),
        ({"overrides": {"depth": 1}}, "depth 2 -> 1"),
    ],
)
@pytest.mark.parametrize("allows", [False, True])
def test_another_model_is_refused_even_where_changes_are_allowed(
    fit: Fit, saved: Path, changes: dict[str, Any], named: str, allows: bool
) -> None:
    complaint = rf"another model than the config's \({named}.*start a new run from its weights with model.init_from"
    with pytest.raises(ValueError, match=complaint):
        resume(fit, saved, {**changes, "allows": allows})


def test_settings_of_training_do_not_matter_to_validation(saved: Path, tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=1, default_root_dir=tmp_path
    )
    trainer.validate(module(lr=0.5, seed=3), DigitsDataModule(batch_size=7), ckpt_path=saved, verbose=False)


def test_a_checkpoint_of_before_there_were_settings_is_resumed(fit: Fit, saved: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    for name in ("run", "generators"):
        del checkpoint["flexidit"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match="the checkpoint holds none and this run has 1"):
        assert resume(fit, tmp_path / "old.ckpt", {}).global_step == 3


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.values.append(outputs["loss"].detach())


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_the_same_global_batch_in_other_pieces_goes_on_as_the_run_would_have(
    fit: Fit, tmp_path: Path, first: int, then: int
) -> None:
    """As on half of the devices with twice the accumulation: the same samples with the same draws in each step."""

    def run(accumulate: int, steps: int, ckpt_path: Path | None = None) -> tuple[list[float], pl.Trainer]:
        losses = Losses()
        trainer = fit(
            module(), steps, data=DigitsDataModule(batch_size=16 // accumulate), callbacks=[EMA(0.5), losses],
            ckpt_path=ckpt_path, accumulate_grad_batches=accumulate, precision="64-true",
        )  # fmt: skip
        return torch.stack(losses.values).view(-1, accumulate).mean(1).tolist(), trainer

    whole, _ = run(1, 7)
    begun, trainer = run(first, 3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rest, _ = run(then, 7, tmp_path / "last.ckpt")
    scale = [1 / first] * 3 + [1 / then] * 4  # Lightning divides the losses of micro-batches
    assert len(begun + rest) == 7
    for value, expected, factor in zip(begun + rest, whole, scale, strict=True):
        assert min(abs(value - expected), abs(value / factor - expected)) < 1e-9


def test_data_describe_what_decides_their_batches() -> None:
    one = CaptionedDigitsDataModule(batch_size=8).resume_settings
    assert differences(one, CaptionedDigitsDataModule(batch_size=8, num_workers=2).resume_settings) == []
    other = CaptionedDigitsDataModule(batch_size=8, caption_length=20).resume_settings
    assert differences(one, other) == ["text_encoder.max_length 16 -> 20"]
    clips, images = (MovingDigitsDataModule(single_frames=single).resume_settings for single in (False, True))
    assert differences(clips, images) == ["single_frames False -> True"]


def test_modules_describe_their_losses() -> None:
    distillation = (Distillation(target(), distill_variance=on).resume_settings for on in (False, True))
    assert differences(*distillation) == ["distill_variance False -> True"]
    ranges = (TextToImage(target(), timestep_ranges=given).resume_settings for given in (None, {"4": (0, 500)}))
    assert differences(*ranges) == ["timestep_ranges none -> 4 (0, 500)"]
