"""Distillation of clips: modes in time and in space of one student, each alone in its steps; the base as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from callbacks.ema import EMA
from datamodules.moving_digits import MovingDigitsDataModule
from flexidit import create_model, flexify, load_checkpoint
from flexidit.conditions import Captions
from flexidit.diffusion.process import process_of
from flexidit.inflation import inflate
from flexidit.lora import merged_copy
from flexidit.patch_size import PatchSize
from flexidit.variants import variant_config
from lightning_modules import Pretraining, TextToVideo
from lightning_modules.base import DiffusionModule
from lightning_modules.draws import SampleDraws
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

Fit = Callable[..., pl.Trainer]
MakeTarget = Callable[..., TargetSettings]
CLIP = (5, 12, 12)  # frames that 2x2x2 does not divide, and a side that 1x8x8 would not
VIDEO: dict[str, Any] = {"input_size": CLIP, "hidden_size": 48, "num_heads": 2}  # heads of Wan's three axes
WEAK: list[int | str] = ["2x2x2", "1x4x4", "2x4x4"]
MODES = FlexSettings(WEAK, recipe="lora", rank=4)
KINDS = {"TextDiT": "VideoDiT-Tiny", "Wan": "Wan-Tiny"}


class Watch(Callback):
    """Names with a gradient before every optimizer step, and all weights before the first."""

    def __init__(self) -> None:
        self.names: list[set[str]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.names.append({name for name, p in pl_module.named_parameters() if p.grad is not None})


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return next(iter(moving_digits(4).train_dataloader()))


def moving_digits(batch_size: int = 8, **options: Any) -> MovingDigitsDataModule:
    frames, side, _ = CLIP
    return MovingDigitsDataModule(side, frames, batch_size=batch_size, **options)


def clip_fit(fit: Fit, module: DiffusionModule, steps: int = 6, **options: Any) -> pl.Trainer:
    return fit(module, steps, data=moving_digits(), **options)


def distilled(fit: Fit, target: TargetSettings, **options: Any) -> tuple[TextToVideo, Watch]:
    module = TextToVideo(target, MODES, OptimizerSettings(lr=1e-2), seed=1)
    clip_fit(fit, module, 8, callbacks=[watch := Watch(), EMA(0.5)], gradient_clip_val=0.02, **options)
    return module, watch


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest, make_target: MakeTarget) -> TargetSettings:
    return make_target(KINDS[request.param], **VIDEO)


def test_training_leaves_the_base_as_it_was_and_merges(target: TargetSettings, fit: Fit, batch: dict[str, Any]) -> None:
    module, watch = distilled(fit, target, limit_val_batches=1, val_check_interval=3)
    original, student = target.build().eval(), module.model.eval()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, watch.start[name])}
    assert moved and moved <= trained and {size for size in WEAK if any(str(size) in name for name in moved)} == {*WEAK}
    x, t, y = batch["x"], torch.tensor([3.0, 100.0, 400.0, 999.0]), batch["y"]
    with torch.no_grad():
        assert torch.equal(student(x, t, y, patch_size=2), original(x, t, y, patch_size=2))
        for size in WEAK:
            merged = merged_copy(student, size)(x, t, y, patch_size=size)
            torch.testing.assert_close(merged, student(x, t, y, patch_size=size), rtol=1e-3, atol=1e-4)


def test_a_step_trains_one_mode_and_all_have_their_turn(target: TargetSettings, fit: Fit) -> None:
    module, watch = distilled(fit, target)
    turns = [module.patch_size_at(step).name for step in range(8)]
    assert set(turns) == {*WEAK}
    for turn, names in zip(turns, watch.names, strict=True):
        own = {name for name, p in module.named_parameters() if p.requires_grad and turn in name}
        assert names == own


def test_the_loss_is_the_distance_from_the_velocity_of_the_base(target: TargetSettings, batch: dict[str, Any]) -> None:
    module = TextToVideo(target, MODES)
    module.configure_model()
    module.eval()
    original, draws = target.build().eval(), SampleDraws(0, "test", 0, range(4))
    for size in map(PatchSize.parse, WEAK):
        noisy = module.noised(batch, size, draws)
        theirs = original(noisy.x_t, noisy.times, noisy.y, patch_size=2)[:, :1]
        ours = module.model(noisy.x_t, noisy.times, noisy.y, patch_size=size)[:, :1]
        torch.testing.assert_close(module.loss(batch, size, draws), (ours - theirs).square().mean())


def test_a_checkpoint_is_the_adapters_and_their_average(target: TargetSettings, fit: Fit, tmp_path: Path) -> None:
    module = TextToVideo(target, MODES, OptimizerSettings(lr=1e-2))
    ema = EMA(0.5)
    clip_fit(fit, module, callbacks=[ema]).save_checkpoint(tmp_path / "clips.ckpt")
    saved = torch.load(tmp_path / "clips.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {name for name, p in module.named_parameters() if p.requires_grad}
    restored = dict(load_checkpoint(tmp_path / "clips.ckpt").named_parameters())
    for name, value in ema.average.items():
        assert torch.equal(restored[name.removeprefix("model.")], value)


def test_an_image_model_starts_the_pre_training_of_clips(make_target: MakeTarget, fit: Fit) -> None:
    sizes = {"input_size": 12, "hidden_size": 48, "num_heads": 2, "learn_sigma": False, "position_table": "learned"}
    image = make_target("TextDiT-Tiny/2", **sizes)
    start = TargetSettings("VideoDiT-Tiny", {**VIDEO, **_like(image)}, inflate_from=image.checkpoint)
    module = Pretraining(start)
    module.configure_model()
    expected = inflate(image.build(), CLIP)
    state = module.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    trainer = clip_fit(fit, module, 2)
    assert trainer.callback_metrics["train/loss"].isfinite()


def _like(image: TargetSettings) -> dict[str, Any]:
    config = image.build().config
    names = ("mlp", "mlp_ratio", "qk_norm", "caption_channels", "caption_length", "learn_sigma", "position_table")
    return {name: getattr(config, name) for name in (*names, "depth", "in_channels")}


@pytest.mark.parametrize(
    ("variant", "overrides", "complaint"),
    [
        ("TextDiT-Tiny/2", {}, r"a TextDiT that takes images of \(8, 8\): give a Wan"),
        ("DiT-Tiny/2", {"num_classes": 10}, r"a DiT that takes images of \(8, 8\): give a Wan"),
    ],
)
def test_a_target_of_images_is_refused(
    make_target: MakeTarget, variant: str, overrides: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        TextToVideo(make_target(variant, **overrides)).configure_model()


def test_clips_of_another_length_are_refused(make_target: MakeTarget, fit: Fit) -> None:
    module = TextToVideo(make_target("VideoDiT-Tiny", **{**VIDEO, "input_size": (4, 12, 12)}), MODES)
    with pytest.raises(ValueError, match=r"samples of shape \(1, 5, 12, 12\), the model takes \(1, 4, 12, 12\)"):
        clip_fit(fit, module)


def test_a_config_may_change_one_field_of_the_defaults() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextToVideo, "model")
    given = {"target": {"variant": "VideoDiT-Tiny"}, "flex": {"rank": 8}, "optimizer": {"lr": 1e-3}}
    parsed = parser.parse_object({"model": {"class_path": "lightning_modules.TextToVideo", "init_args": given}})
    module = parser.instantiate_classes(parsed).model
    assert module.flex_settings == FlexSettings(["2x2x2", "1x4x4"], recipe="lora", rank=8)
    assert module.optimizer_settings == OptimizerSettings(lr=1e-3, weight_decay=1e-2)


@pytest.fixture(scope="module")
def real_latents(test_data: Path) -> Tensor:
    """(1, 16, 21, 10, 16): a corner of sixteen real frames of Wan 2.1's latents, and five of them played backwards."""
    latents = torch.load(test_data / "videos" / "test_latents_wan.pth", map_location="cpu", weights_only=True)
    corner = latents[..., :10, :16].float()
    return torch.cat([corner, corner[:, :, -6:-1].flip(2)], 2)


@pytest.fixture(scope="module")
def wide_wan(randomised: Callable[..., nn.Module]) -> nn.Module:
    """Wan-1.3B's layers, two of its thirty."""
    width = variant_config("Wan-1.3B").hidden_size
    model = create_model("Wan-1.3B", depth=2, caption_length=16)
    assert model.config.hidden_size == width == 1536
    return flexify(randomised(model, std=0.02), WEAK, recipe="lora", rank=8)


@pytest.mark.parametrize("num_frames", [16, 21])
def test_real_latents_pass_a_wan_of_full_width_in_every_mode(
    wide_wan: Any, real_latents: Tensor, num_frames: int
) -> None:
    x = real_latents[:, :, :num_frames]
    y = Captions(torch.randn(1, 16, wide_wan.config.caption_channels), torch.ones(1, 16, dtype=torch.bool))
    with torch.no_grad():
        for size in wide_wan.patch_sizes:
            out = wide_wan(x, torch.tensor([500.0]), y, patch_size=size)
            assert out.shape == x.shape and out.isfinite().all() and out.std() > 0


def test_real_latents_distil_every_mode_of_a_wan_of_full_width(wide_wan: Any, real_latents: Tensor) -> None:
    module = TextToVideo(TargetSettings("Wan-1.3B"), FlexSettings(WEAK, recipe="lora", rank=8)).eval()  # drops nothing
    module.model, module.process = wide_wan, process_of(wide_wan.config)
    y = Captions(torch.randn(1, 16, wide_wan.config.caption_channels), torch.ones(1, 16, dtype=torch.bool))
    for size in wide_wan.patch_sizes[1:]:
        module.loss({"x": real_latents, "y": y}, size, SampleDraws(0, "test", 0, [0])).backward()
    grads = {name: p.grad for name, p in wide_wan.named_parameters() if p.grad is not None}
    assert grads.keys() == {name for name, p in wide_wan.named_parameters() if p.requires_grad}
    assert all(grad.isfinite().all() for grad in grads.values())
