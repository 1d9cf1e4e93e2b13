"""Distillation into adapters: what trains, what stays, what teacher and student are told, and that it can go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import AdamW

from callbacks.ema import EMA
from datamodules.captioned_digits import CaptionedDigitsDataModule
from flexidit import flops
from flexidit.lora import merged_copy
from flexidit.patch_size import PatchSize
from flexidit.recipes import added_parameters
from lightning_modules import Distillation
from lightning_modules.base import GAP_TIMESTEPS
from lightning_modules.draws import SampleDraws
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

Fit = Callable[..., pl.Trainer]
MakeTarget = Callable[..., TargetSettings]
TWO_SIZES = FlexSettings([4, 8], recipe="lora", rank=4)
JUDGE = SampleDraws(0, "test", 0, range(16))


class Watch(Callback):
    """Loss of every micro-batch; the gradients that were there before every optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append(gradients)


def text_fit(fit: Fit, module: Distillation, *args: Any, **options: Any) -> pl.Trainer:
    return fit(module, *args, has_captions=True, **options)


def configured(target: TargetSettings, flex: FlexSettings = TWO_SIZES, **options: Any) -> Distillation:
    module = Distillation(target, flex, **options)
    module.configure_model()
    return module


def batch(count: int = 16) -> dict[str, Any]:
    return next(iter(CaptionedDigitsDataModule(batch_size=count).train_dataloader()))


def own_names(module: Distillation, size: str) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad and size in name}


def test_the_loss_falls_for_every_weak_size_on_a_repeated_batch(make_target: MakeTarget) -> None:
    module, data = configured(make_target()), batch()
    optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)

    def judged() -> list[float]:
        return [module.loss(data, size, JUDGE).item() for size in module.judged_patch_sizes]

    before = judged()
    for step in range(60):
        module.loss(data, module.patch_size_at(step), SampleDraws(0, "train", step, range(16))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(before) == 2
    assert all(after < 0.9 * start for after, start in zip(judged(), before, strict=True))


@pytest.mark.parametrize("distills_variance", [False, True], ids=["eps", "variance"])
def test_the_loss_is_the_distance_from_the_base_s_prediction(make_target: MakeTarget, distills_variance: bool) -> None:
    module, data = configured(make_target(), distill_variance=distills_variance).eval(), batch()
    size = PatchSize.parse(4)
    noisy = module.noised(data, size, JUDGE)
    ours, theirs = (module.model(noisy.x_t, noisy.t, data["y"], patch_size=p) for p in (size, 2))
    channels = 2 if distills_variance else 1
    expected = (ours - theirs)[:, :channels].square().mean()
    torch.testing.assert_close(module.loss(data, size, JUDGE), expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_trains_what_belongs_to_its_size_and_nothing_else(
    make_target: MakeTarget, fit: Fit, checkpointing: bool, precision: Any
) -> None:
    module = Distillation(make_target(), TWO_SIZES, gradient_checkpointing=checkpointing)
    text_fit(fit, module, 6, callbacks=[watch := Watch()], precision=precision)
    seen = [module.patch_size_at(step).name for step in range(6)]
    assert set(seen) == {"1x4x4", "1x8x8"}
    for size, gradients in zip(seen, watch.gradients, strict=True):
        assert set(gradients) == own_names(module, size)
        # B is zero before the first update, and stops the gradient of A there; nothing reaches unused channels
        assert all(gradients[name].any() for name in gradients if "lora_A" not in name)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == added_parameters(module.model)[0]


def test_recomputed_activations_give_the_same_gradients(make_target: MakeTarget, fit: Fit) -> None:
    kept, recomputed = Watch(), Watch()
    for watch, checkpointing in ((kept, False), (recomputed, True)):
        module = Distillation(make_target(), TWO_SIZES, gradient_checkpointing=checkpointing)
        text_fit(fit, module, 4, callbacks=[watch])
    assert kept.losses == recomputed.losses
    for ours, theirs in zip(kept.gradients, recomputed.gradients, strict=True):
        assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


@pytest.mark.slow
def test_compiled_blocks_train_alike(make_target: MakeTarget, fit: Fit) -> None:
    target, plain, compiled = make_target(), Watch(), Watch()
    for watch, compile in ((plain, False), (compiled, True)):
        options = {"limit_val_batches": 1, "val_check_interval": 2}
        text_fit(fit, Distillation(target, TWO_SIZES, compile=compile), 4, callbacks=[watch], **options)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.parametrize("variant", ["TextDiT-Tiny/2", "DiT-Tiny/2"])
def test_training_leaves_the_base_as_it_was_and_merges(make_target: MakeTarget, fit: Fit, variant: str) -> None:
    is_text = variant.startswith("Text")
    target = make_target(variant, **({} if is_text else {"num_classes": 10}))
    module = Distillation(target, TWO_SIZES)
    options = {"gradient_clip_val": 0.5, "limit_val_batches": 1, "val_check_interval": 2}
    fit(module, 4, has_captions=is_text, callbacks=[EMA(0.5)], **options)
    original, student = target.build().eval(), module.model.eval()
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([3, 400, 999]), batch(3)["y"] if is_text else torch.arange(3)
    with torch.no_grad():
        assert torch.equal(student(x, t, y, patch_size=2), original(x, t, y, patch_size=2))
        for size in (4, 8):
            merged = merged_copy(student, size)(x, t, y, patch_size=size)
            torch.testing.assert_close(merged, student(x, t, y, patch_size=size), rtol=1e-4, atol=1e-5)


def test_teacher_and_student_see_the_same(make_target: MakeTarget, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    module = configured(make_target(class_dropout_prob=0.5))
    forward, prepare = module.model.forward, module.model.prepare
    told: list[Any] = []

    def spied(x: Tensor, t: Tensor, y: Any, *, patch_size: Any) -> Tensor:
        calls.append((x, t, y, PatchSize.parse(patch_size), torch.is_grad_enabled()))
        return forward(x, t, y, patch_size=patch_size)

    def spied_prepare(y: Any) -> Any:
        told.append(y)
        return prepare(y)

    monkeypatch.setattr(module.model, "forward", spied)
    monkeypatch.setattr(module.model, "prepare", spied_prepare)
    text_fit(fit, module, 4)
    teachers, students = calls[::2], calls[1::2]
    assert len(teachers) == len(students) == len(told) == 4
    for teacher, student in zip(teachers, students, strict=True):
        assert all(ours is theirs for ours, theirs in zip(teacher[:3], student[:3], strict=True))
        assert (teacher[3].name, teacher[4], student[4]) == ("1x2x2", False, True)
        assert student[3] > teacher[3]
    null = module.model.y_embedder.y_embedding
    dropped = [(row == null[: len(row)]).all() for y in told for row in y.embeddings]
    assert 0.2 < sum(dropped) / len(dropped) < 0.8


def test_validation_drops_nothing_and_judges_weak_sizes(make_target: MakeTarget, fit: Fit) -> None:
    module = Distillation(make_target(), TWO_SIZES)
    trainer = text_fit(fit, module, 2, limit_val_batches=1, val_check_interval=2)
    measured = {name for name in trainer.callback_metrics if name.startswith("val/")}
    gap = {f"val/gap_{size}@t{t:03d}" for size in ("1x4x4", "1x8x8") for t in GAP_TIMESTEPS}
    assert measured == {"val/loss_1x4x4", "val/loss_1x8x8"} | gap


def test_the_cost_of_a_step_has_the_teacher_in_it(make_target: MakeTarget, fit: Fit) -> None:
    text_fit(fit, module := Distillation(make_target()), 1)
    base, weak = flops.forward_costs(module.model, merged=False, captions="once").values()
    assert module.step_flops == base + 2 * weak + flops.caption_flops(module.model)


def test_sizes_keep_to_their_timesteps(make_target: MakeTarget, fit: Fit) -> None:
    ranges = {"4": (300, 500), "8": (500, 1000)}
    seen: dict[str, list[int]] = {"1x4x4": [], "1x8x8": []}

    class Watched(Distillation):
        def noised(self, batch: Any, patch_size: PatchSize, draws: SampleDraws) -> Any:
            noisy = super().noised(batch, patch_size, draws)
            seen[patch_size.name] += noisy.t.tolist()
            return noisy

    module = Watched(make_target(), TWO_SIZES, timestep_ranges=ranges)
    text_fit(fit, module, 6, limit_val_batches=1, val_check_interval=6)
    assert all(len(set(times)) > 20 for times in seen.values())
    assert all(300 <= t < 500 for t in seen["1x4x4"])
    assert all(500 <= t < 1000 for t in seen["1x8x8"])


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resume_is_exact(make_target: MakeTarget, fit: Fit, tmp_path: Path, stop: int) -> None:
    """In mid-epoch, with accumulated batches, an average, validation and two weak sizes."""

    def run(steps: int, path: Path | None = None) -> tuple[Distillation, EMA, Watch, pl.Trainer]:
        module = Distillation(make_target(), TWO_SIZES, OptimizerSettings(1e-2, warmup_steps=4))
        options = {"accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 4}
        trainer = text_fit(fit, module, steps, callbacks=[ema := EMA(0.9), watch := Watch()], ckpt_path=path, **options)
        return module, ema, watch, trainer

    whole, whole_ema, everything, _ = run(8)
    _, _, first, trainer = run(stop)
    trainer.save_checkpoint(path := tmp_path / "stopped.ckpt")
    resumed, resumed_ema, rest, _ = run(8, path)
    assert first.losses + rest.losses == everything.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    assert all(torch.equal(value, resumed_ema.average[name]) for name, value in whole_ema.average.items())


def test_only_adapters_are_distilled(make_target: MakeTarget) -> None:
    with pytest.raises(ValueError, match=r"flex.recipe is 'shared': set it to lora"):
        configured(make_target(), FlexSettings([4]))


def test_defaults_are_those_of_table_5(make_target: MakeTarget) -> None:
    module = Distillation(make_target())
    assert module.flex_settings == FlexSettings([4], recipe="lora", rank=32)
    settings = module.optimizer_settings
    assert (settings.lr, settings.weight_decay, settings.decay, settings.warmup_steps) == (8e-4, 1e-2, "constant", 0)
