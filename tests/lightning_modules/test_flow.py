"""Models of a flow in training: pre-training, distillation, fine-tuning, and samples from what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from callbacks.ema import EMA
from callbacks.sample_grid import SampleGrid
from datamodules.captioned_digits import CaptionedDigitsDataModule
from flexidit import PatchSchedule, Sampler, load_checkpoint
from flexidit.cli import main
from flexidit.diffusion.flow import RectifiedFlow
from flexidit.patch_size import PatchSize
from flexidit.variants import create_model
from lightning_modules import ClassConditional, Distillation, Pretraining
from lightning_modules.base import DiffusionModule
from lightning_modules.draws import SampleDraws
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings

Fit = Callable[..., pl.Trainer]
MakeTarget = Callable[..., TargetSettings]
FLOW: dict[str, Any] = {"process": "flow", "time_shift": 3.0, "learn_sigma": False}
ADAPTERS = FlexSettings([4], recipe="lora", rank=4)
JUDGE = SampleDraws(0, "test", 0, range(16))


def batch(count: int = 16) -> dict[str, Any]:
    return next(iter(CaptionedDigitsDataModule(batch_size=count).train_dataloader()))


def flow_of(tiny: TargetSettings) -> TargetSettings:
    return TargetSettings(tiny.variant, {**tiny.overrides, **FLOW})


def configured(module: Any) -> Any:
    module.configure_model()
    return module


def train_on(module: DiffusionModule, data: dict[str, Any], num_steps: int, lr: float = 3e-3) -> None:
    optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    for step in range(num_steps):
        module.loss(data, module.patch_size_at(step), SampleDraws(0, "train", step, range(16))).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("flex", [None, FlexSettings([4])], ids=["plain", "flexible"])
def test_the_loss_of_pretraining_falls_on_a_repeated_batch(
    tiny_text: TargetSettings, flex: FlexSettings | None
) -> None:
    module, data = configured(Pretraining(flow_of(tiny_text), flex)), batch()
    before = [module.loss(data, size, JUDGE).item() for size in module.judged_patch_sizes]
    train_on(module, data, 60)
    after = [module.loss(data, size, JUDGE).item() for size in module.judged_patch_sizes]
    assert all(late < 0.8 * early for early, late in zip(before, after, strict=True))


def test_the_loss_is_that_of_the_velocity_at_the_shifted_times(make_target: MakeTarget) -> None:
    module, data, size = configured(Pretraining(make_target(**FLOW))).eval(), batch(), PatchSize.parse(2)
    noisy = module.noised(data, size, JUDGE)
    s = (noisy.t.double() + 1) / 1000
    sigma = 3 * s / (1 + 2 * s)
    torch.testing.assert_close(noisy.times, (1000 * sigma).float())
    wide = sigma.view(-1, 1, 1, 1).float()
    torch.testing.assert_close(noisy.x_t, (1 - wide) * data["x"] + wide * noisy.noise)
    velocity = module.model(noisy.x_t, noisy.times, data["y"], patch_size=2)
    expected = (velocity - (noisy.noise - data["x"])).square().mean()
    torch.testing.assert_close(module.loss(data, size, JUDGE), expected)


@pytest.mark.parametrize("process", [{}, FLOW], ids=["diffusion", "flow"])
def test_the_model_is_told_the_times_of_its_process(
    make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch, process: dict[str, Any]
) -> None:
    module, told = configured(Distillation(make_target(**process), ADAPTERS)), list[Tensor]()
    embed = module.model.embed_condition
    monkeypatch.setattr(module.model, "embed_condition", lambda t, y, size: told.append(t) or embed(t, y, size))
    module.loss(batch(), PatchSize.parse(4), JUDGE)
    t = JUDGE.timesteps(range(1000), torch.device("cpu"))
    expected = RectifiedFlow(shift=3.0).model_timesteps(t) if process else t
    assert len(told) == 2 and all(torch.equal(times, expected) for times in told)


def test_distillation_compares_velocities_and_leaves_the_base_as_it_was(make_target: MakeTarget) -> None:
    target = make_target(**FLOW)
    module, data, weak = configured(Distillation(target, ADAPTERS)), batch(), PatchSize.parse(4)
    noisy = module.eval().noised(data, weak, JUDGE)
    ours, theirs = (module.model(noisy.x_t, noisy.times, data["y"], patch_size=p) for p in (4, 2))
    before = module.loss(data, weak, JUDGE)
    torch.testing.assert_close(before, (ours - theirs).square().mean())
    train_on(module.train(), data, 60)
    assert module.eval().loss(data, weak, JUDGE) < 0.9 * before
    original, student = target.build().eval(), module.model.eval()
    told = (noisy.x_t, noisy.times, data["y"])
    assert torch.equal(student(*told, patch_size=2), original(*told, patch_size=2))


def test_what_is_trained_can_be_stored_and_sampled(make_target: MakeTarget, fit: Fit, tmp_path: Path) -> None:
    module = Distillation(make_target(**FLOW), ADAPTERS)
    grid = SampleGrid(num_columns=2, num_sampling_steps=2, budgets=[1.0])
    options = {"limit_val_batches": 1, "val_check_interval": 2, "callbacks": [EMA(0.5), grid]}
    trainer = fit(module, 4, has_captions=True, **options)
    assert {"val/loss_1x4x4", "val/gap_1x4x4@t950"} <= set(trainer.callback_metrics)
    assert list(tmp_path.rglob("samples/step_00000004.png"))
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    model = load_checkpoint(path)
    assert (model.config.process, model.config.time_shift) == ("flow", 3.0)

    sampler = Sampler(model, schedule=PatchSchedule.parse("4:2,2:2"), cfg_scale=2.0)
    y, generator = batch(2)["y"], torch.Generator().manual_seed(0)
    assert sampler(y, generator=generator).isfinite().all() and sampler.solver_name == "unipc (time shift 3)"

    for solver in (["--solver", "unipc"], ["--solver", "euler", "--time-shift", "5"], []):
        asked = ["--prompts", "a bold seven", "--schedule", "4:2,2:2", "--latents", *solver]
        out = ["--out", str(tmp_path / "out"), "--device", "cpu", "--merge"]
        assert main(["sample", str(path), *asked, *out]) == 0
        report = json.loads((tmp_path / "out" / "samples.json").read_text())
        assert report["solver"] == ("euler (time shift 5)" if len(solver) == 4 else "unipc (time shift 3)")


def test_wrong_solvers_end_in_one_sentence(
    make_target: MakeTarget, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_target("DiT-Tiny/2", num_classes=10, **FLOW).checkpoint
    for option, complaint in (("--solver=ddim", "give one of unipc, euler, dpm++"), ("--time-shift=0", "above 0")):
        asked = ["--classes", "1", "--steps", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
        assert main(["sample", str(path), option, *asked]) == 2
        assert complaint in capsys.readouterr().err


def test_fine_tuning_runs_without_matching_only(make_target: MakeTarget, fit: Fit) -> None:
    target = make_target("DiT-Tiny/2", num_classes=10, **FLOW)
    fit(ClassConditional(target, FlexSettings([4])), 2)
    matching = MatchingSettings(weight=0.1)
    with pytest.raises(ValueError, match=r"this model's process is 'flow': set matching.weight to 0"):
        ClassConditional(target, FlexSettings([4]), matching).configure_model()


def test_a_checkpoint_of_another_process_or_shift_is_refused(make_target: MakeTarget) -> None:
    overrides = {**create_overrides(), **FLOW}
    path = make_target(**FLOW).checkpoint
    assert TargetSettings("TextDiT-Tiny/2", overrides, path).build().config.process == "flow"
    for changed, complaint in (
        ({"process": "diffusion", "time_shift": 1.0}, "has process=flow, but .* say diffusion"),
        ({"time_shift": 5.0}, "has time_shift=3.0, but .* say 5.0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            TargetSettings("TextDiT-Tiny/2", {**overrides, **changed}, path).build()


def create_overrides() -> dict[str, Any]:
    return {"input_size": 8, "in_channels": 1, "depth": 2, "hidden_size": 32, "num_heads": 2}


def test_official_weights_are_told_their_process(tmp_path: Path) -> None:
    overrides = {**create_overrides(), **FLOW}
    model = create_model("TextDiT-Tiny/2", **overrides)
    torch.save(model.state_dict(), path := tmp_path / "weights.pth")
    assert TargetSettings("TextDiT-Tiny/2", overrides, str(path)).build().config == model.config


def test_a_resume_is_exact(make_target: MakeTarget, fit: Fit, tmp_path: Path) -> None:
    def run(steps: int, path: Path | None = None) -> tuple[Distillation, pl.Trainer]:
        module = Distillation(make_target(**FLOW), ADAPTERS, OptimizerSettings(1e-2))
        return module, fit(module, steps, has_captions=True, ckpt_path=path)

    whole, _ = run(5)
    _, trainer = run(3)
    trainer.save_checkpoint(path := tmp_path / "stopped.ckpt")
    resumed, _ = run(5, path)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
