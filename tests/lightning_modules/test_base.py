"""What every training module keeps: pure draws, learning, clipping, validation, checkpoints that anyone may read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from callbacks.ema import EMA
from datamodules.digits import DigitsDataModule
from flexidit import load_checkpoint
from flexidit.patch_size import PatchSize
from lightning_modules import Pretraining
from lightning_modules.base import GAP_TIMESTEPS, DiffusionModule
from lightning_modules.draws import SampleDraws
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

Fit = Callable[..., pl.Trainer]


class Losses(Callback):
    """Loss of every micro-batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.values.append(outputs["loss"].item())


class FusedAdamW(OptimizerSettings):
    """The kernel that Lightning will not clip for, here on a CPU."""

    def build(self, parameters: Any, max_steps: float, fused: bool = True) -> tuple[AdamW, LambdaLR]:
        optimizer = AdamW(parameters, lr=self.lr, fused=True)
        return optimizer, LambdaLR(optimizer, lambda step: 1.0)


def flexible(tiny: TargetSettings, **options: Any) -> Pretraining:
    return Pretraining(tiny, FlexSettings([4]), OptimizerSettings(lr=1e-3), **options)


def weights(module: DiffusionModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def digits(count: int = 16) -> Mapping[str, Tensor]:
    data = DigitsDataModule(batch_size=count)
    return next(iter(data.train_dataloader()))


def test_the_loss_falls_on_a_repeated_batch(tiny: TargetSettings) -> None:
    module = flexible(tiny)
    module.configure_model()
    batch, optimizer = digits(), AdamW(module.parameters(), lr=3e-3)
    judge = SampleDraws(0, "test", 0, range(16))

    def judged() -> list[float]:
        return [module.loss(batch, size, judge).item() for size in module.model.patch_sizes]

    before = judged()
    for step in range(60):
        loss = module.loss(batch, module.patch_size_at(step), SampleDraws(0, "train", step, range(16)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(after < 0.9 * start for after, start in zip(judged(), before, strict=True))


def test_training_ignores_the_global_generator(tiny: TargetSettings, fit: Fit) -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fit(module := flexible(tiny), max_steps=4)
        runs.append(weights(module))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_validation_does_not_disturb_training(tiny: TargetSettings, fit: Fit) -> None:
    alone, watched = Losses(), Losses()
    fit(flexible(tiny), max_steps=5, callbacks=[alone])
    fit(flexible(tiny), 5, callbacks=[watched, EMA(0.9)], limit_val_batches=2, val_check_interval=2)
    assert alone.values == watched.values


def test_another_seed_is_another_run(tiny: TargetSettings, fit: Fit) -> None:
    fit(flexible(tiny, seed=0), callbacks=[first := Losses()])
    fit(flexible(tiny, seed=1), callbacks=[second := Losses()])
    assert first.values != second.values


def test_micro_batches_make_the_step_of_the_whole_batch(tiny: TargetSettings, fit: Fit) -> None:
    fit(whole := flexible(tiny), 4, batch_size=16, precision="64-true")
    fit(split := flexible(tiny), 4, batch_size=8, precision="64-true", accumulate_grad_batches=2)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], value, rtol=0, atol=1e-9)


def test_all_micro_batches_of_a_step_share_its_patch_size(tiny: TargetSettings, fit: Fit) -> None:
    sizes: list[tuple[int, PatchSize]] = []

    class Watched(Pretraining):
        def loss(self, batch: Any, patch_size: PatchSize, draws: SampleDraws) -> Tensor:
            sizes.append((self.global_step, patch_size))
            return super().loss(batch, patch_size, draws)

    module = Watched(tiny, FlexSettings([4]))
    fit(module, max_steps=8, accumulate_grad_batches=3)
    assert len(sizes) == 24
    assert all(size == module.patch_size_at(step) for step, size in sizes)
    assert len({size for _, size in sizes}) == 2


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fused_optimizer_is_clipped_under_mixed_precision(tiny: TargetSettings, fit: Fit, algorithm: str) -> None:
    largest: list[float] = []

    class Clipped(Pretraining):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            largest.append(norm.item() if algorithm == "norm" else max(g.abs().max().item() for g in gradients))

    module = Clipped(tiny, FlexSettings([4]), FusedAdamW())
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    fit(module, precision="bf16-mixed", **options)
    assert largest == pytest.approx([1e-3] * 3, rel=1e-3)


def test_lightning_itself_still_refuses_to(tiny: TargetSettings, fit: Fit) -> None:
    class Plain(Pretraining):
        configure_gradient_clipping = pl.LightningModule.configure_gradient_clipping  # type: ignore[assignment]

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Plain(tiny, optimizer=FusedAdamW()), precision="bf16-mixed", gradient_clip_val=0.1)


def test_validation_logs_losses_gap_and_a_figure(tiny: TargetSettings, fit: Fit, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="board", version="")
    trainer = fit(flexible(tiny), 2, logger=logger, limit_val_batches=1, val_check_interval=2, log_every_n_steps=1)
    losses = {"val/loss_1x2x2", "val/loss_1x4x4"}
    gap = {f"val/gap_1x4x4@t{t:03d}" for t in GAP_TIMESTEPS}
    assert losses | gap <= set(trainer.callback_metrics)
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0})
    board.Reload()
    assert losses | gap | {"train/loss"} <= set(board.Tags()["scalars"])
    assert "val/gap" in board.Tags()["images"]


def test_validation_is_judged_on_the_same_draws_whatever_the_batch(tiny: TargetSettings, fit: Fit) -> None:
    def judged(batch_size: int) -> float:
        options = {
            "limit_val_batches": 1.0,
            "num_sanity_val_steps": 0,
            "val_check_interval": 1,
            "limit_train_batches": 1,
        }
        module = Pretraining(tiny, optimizer=OptimizerSettings(lr=0.0))
        trainer = fit(module, 1, batch_size, precision="64-true", **options)
        return trainer.callback_metrics["val/loss_1x2x2"].item()

    assert judged(50) == pytest.approx(judged(77), rel=1e-9)


def test_a_checkpoint_is_plain_and_gives_the_averaged_student(tiny: TargetSettings, fit: Fit, tmp_path: Path) -> None:
    average = EMA(0.5)
    trainer = fit(flexible(tiny), 3, callbacks=[average])
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    torch.load(path, weights_only=True)
    loaded = load_checkpoint(path)
    assert [size.name for size in loaded.patch_sizes] == ["1x2x2", "1x4x4"]
    state = loaded.state_dict()
    assert average.average
    assert all(torch.equal(state[name.removeprefix("model.")], value) for name, value in average.average.items())


def test_weights_of_patch_sizes_are_checked_and_respected(tiny: TargetSettings) -> None:
    module = flexible(tiny, patch_size_weights={"4": 1.0})
    module.configure_model()
    assert {module.patch_size_at(step).name for step in range(20)} == {"1x4x4"}


@pytest.mark.parametrize("given", [{"8": 1.0}, {"2": 0.0}, {"2": 1.0, "4": -1.0}, {}])
def test_senseless_weights_are_refused(tiny: TargetSettings, given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="the patch sizes that train: 1x2x2, 1x4x4"):
        flexible(tiny, patch_size_weights=given).configure_model()


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        ({"in_channels": 4}, "samples of shape"),
        ({"input_size": 16}, "samples of shape"),
        ({"num_classes": 9}, "10 classes"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(
    tiny: TargetSettings, fit: Fit, overrides: dict[str, int], complaint: str
) -> None:
    target = TargetSettings(tiny.variant, {**tiny.overrides, **overrides})
    with pytest.raises(ValueError, match=complaint):
        fit(Pretraining(target))


@pytest.mark.slow
def test_compiled_blocks_train_alike(tiny: TargetSettings, fit: Fit) -> None:
    plain, compiled = Losses(), Losses()
    fit(flexible(tiny), callbacks=[plain])
    fit(flexible(tiny, compile=True), callbacks=[compiled])
    assert compiled.values == pytest.approx(plain.values, rel=1e-4)


def test_recomputed_activations_train_alike(tiny: TargetSettings, fit: Fit) -> None:
    plain, checkpointed = Losses(), Losses()
    fit(flexible(tiny), callbacks=[plain])
    fit(flexible(tiny, gradient_checkpointing=True), callbacks=[checkpointed])
    assert checkpointed.values == plain.values
