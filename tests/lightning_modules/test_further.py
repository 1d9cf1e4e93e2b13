"""``init_from``: a new run from an earlier student's weights, of any file; more sizes; what has no meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from callbacks.ema import EMA
from datamodules.moving_digits import MovingDigitsDataModule
from flexidit import create_model, flexify, load_checkpoint
from flexidit.checkpoint import save_checkpoint
from flexidit.export import adapters_of, save_peft
from flexidit.identity import base_hash
from flexidit.models import FlexiTransformer
from lightning_modules import ClassConditional, Distillation, Pretraining, TextToImage, TextToVideo
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

Fit = Callable[..., pl.Trainer]
MakeTarget = Callable[..., TargetSettings]
NO_TARGET = TargetSettings()
LR = OptimizerSettings(lr=1e-2)


def lora(*sizes: int | str, rank: int = 4, positions: Any = "coords") -> FlexSettings:
    return FlexSettings(list(sizes), recipe="lora", rank=rank, positions=positions)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(some: dict[str, Tensor], all_of: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, all_of[name]) for name, value in some.items())


def built(module: Any) -> FlexiTransformer:
    module.configure_model()
    return module.model


@pytest.fixture
def trained(make_target: MakeTarget, fit: Fit, tmp_path: Path) -> tuple[TargetSettings, Path]:
    """A base, and the checkpoint of a distillation that changed its adapters."""
    target, path = make_target(), tmp_path / "first.ckpt"
    fit(TextToImage(target, lora(4), LR), 4, has_captions=True, callbacks=[EMA(0.5)]).save_checkpoint(path)
    return target, path


def test_a_run_from_a_training_checkpoint_starts_with_its_averaged_weights_and_nothing_else(
    trained: tuple[TargetSettings, Path], fit: Fit, tmp_path: Path
) -> None:
    _, path = trained
    average, raw = (tensors(load_checkpoint(path, prefer_ema=ema)) for ema in (True, False))
    begun = built(TextToImage(NO_TARGET, lora(4), LR, init_from=str(path)))
    assert same(tensors(begun), average)
    assert not same(tensors(begun), raw)
    trainer = fit(module := TextToImage(NO_TARGET, lora(4), LR, init_from=str(path)), 1, has_captions=True,
                  callbacks=[ema := EMA(0.5)])  # fmt: skip
    assert (trainer.global_step, ema.num_updates) == (1, 1)
    state = trainer.optimizers[0].state
    assert {float(moments["step"]) for moments in state.values()} == {1.0}
    assert not same(tensors(module.model), average)


def test_a_lora_student_gets_another_mode_on_a_base_that_stays_bit_for_bit(
    trained: tuple[TargetSettings, Path], fit: Fit, tmp_path: Path
) -> None:
    target, path = trained
    base, before = tensors(target.build()), tensors(load_checkpoint(path))
    module = TextToImage(NO_TARGET, lora(4, 8), LR, init_from=str(path))
    after = tensors(built(module))
    assert same(before, after)
    assert {name.split(".1x8x8")[0] for name in after.keys() - before.keys()} >= {"size_embedder"}
    trainer = fit(module, 6, has_captions=True)
    assert {module.patch_size_at(step).name for step in range(6)} == {"1x4x4", "1x8x8"}
    trained_base = {name.replace(".base_layer.", "."): value for name, value in tensors(module.model).items()}
    assert same(base, trained_base)
    assert module.base_identity is not None and module.base_identity.hash == base_hash(module.model)
    assert module.base_identity.source == target.checkpoint
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    assert load_checkpoint(tmp_path / "second.ckpt").patch_sizes == module.model.patch_sizes


def test_a_shared_student_gets_another_size(make_target: MakeTarget, fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "first.ckpt"
    fit(ClassConditional(make_target("DiT-Tiny/2"), FlexSettings([4]), optimizer=LR), 3).save_checkpoint(path)
    before = tensors(load_checkpoint(path))
    module = ClassConditional(NO_TARGET, FlexSettings([4, 8]), optimizer=LR, init_from=str(path))
    assert same(before, tensors(built(module)))
    assert str(module.model.config.flex.underlying_patch_size.name) == "1x4x4"  # type: ignore[union-attr]
    fit(module, 6).save_checkpoint(tmp_path / "second.ckpt")
    again = ClassConditional(NO_TARGET, FlexSettings([4, 8]), optimizer=LR, init_from=str(path))
    assert fit(again, 8, ckpt_path=tmp_path / "second.ckpt").global_step == 8  # its own resume, file or not


def test_a_video_student_gets_another_mode(make_target: MakeTarget, fit: Fit, tmp_path: Path) -> None:
    target = make_target("VideoDiT-Tiny", input_size=(4, 12, 12), caption_channels=64)
    data, path = MovingDigitsDataModule(12, 4, batch_size=4), tmp_path / "first.ckpt"
    fit(TextToVideo(target, lora("1x4x4"), LR), 2, data=data).save_checkpoint(path)
    before = tensors(load_checkpoint(path))
    module = TextToVideo(NO_TARGET, lora("2x2x2", "1x4x4"), LR, init_from=str(path))
    assert same(before, tensors(built(module)))
    fit(module, 2, data=MovingDigitsDataModule(12, 4, batch_size=4))


@pytest.mark.parametrize("kind", ["adapters", "whole", "peft"])
@pytest.mark.parametrize("names_base", [True, False])
def test_all_kinds_of_files_start_the_same_run(
    make_target: MakeTarget, randomised: Callable[..., nn.Module], tmp_path: Path, kind: str, names_base: bool
) -> None:
    target = make_target("TextDiT-Tiny/2")
    base: Any = load_checkpoint(target.checkpoint or "")
    student = randomised(flexify(base, [4], "lora", rank=4, positions="corners"), seed=1)
    path, source = tmp_path / "student.safetensors", None if names_base else target.checkpoint
    if kind == "peft":
        path = save_peft(adapters_of(student.config, student.state_dict(), source), tmp_path / "peft")
    else:
        save_checkpoint(
            student, path, adapters_only=kind == "adapters", base_source=source if kind != "whole" else None
        )
    given = target if names_base and kind != "whole" else NO_TARGET
    module = TextToImage(given, lora(4, 8, positions="corners"), init_from=str(path))
    assert same(tensors(student), tensors(built(module)))
    expected = str(path) if kind == "whole" else target.checkpoint
    assert module.base_identity is not None and module.base_identity.source == expected


def test_another_base_is_refused(trained: tuple[TargetSettings, Path], make_target: MakeTarget) -> None:
    _, path = trained
    other = make_target(name="other", seed=1)
    with pytest.raises(ValueError, match=r"other.safetensors is not the base that the adapters in .*first.ckpt"):
        built(TextToImage(other, lora(4), init_from=str(path)))


def test_pretraining_goes_on_from_plain_and_from_flexible_weights(
    make_target: MakeTarget, fit: Fit, tmp_path: Path
) -> None:
    for flex in (None, FlexSettings([4])):
        path = tmp_path / "first.ckpt"
        fit(Pretraining(make_target("DiT-Tiny/2"), flex), 1).save_checkpoint(path)
        assert same(tensors(load_checkpoint(path)), tensors(built(Pretraining(NO_TARGET, flex, init_from=str(path)))))


def test_dropout_of_conditions_is_the_new_run_s(trained: tuple[TargetSettings, Path]) -> None:
    target = TargetSettings(overrides={"class_dropout_prob": 0.5})
    assert built(TextToImage(target, lora(4), init_from=str(trained[1]))).config.class_dropout_prob == 0.5


REFUSED: dict[str, tuple[Callable[[str], Any], str]] = {
    "lora to shared": (
        lambda path: ClassConditional(NO_TARGET, FlexSettings([4]), init_from=path),
        "holds adapters of a frozen base, which recipe 'shared' has no place for",
    ),
    "lost size": (lambda path: Distillation(NO_TARGET, lora(8), init_from=path), "sizes 1x4x4 too, which flex.patch_s"),
    "rank": (lambda path: Distillation(NO_TARGET, lora(4, rank=8), init_from=path), "has rank 4, and flex asks for 8"),
    "positions": (
        lambda path: Distillation(NO_TARGET, lora(4, positions="grid"), init_from=path),
        "has positions coords, and flex asks for grid",
    ),
    "no flex": (lambda path: Pretraining(NO_TARGET, None, init_from=path), "holds a flexible model and flex is null"),
    "other model": (
        lambda path: Distillation(TargetSettings("TextDiT-Tiny/2", {"depth": 7}), lora(4), init_from=path),
        "has input_size=|has depth=",
    ),
    "too small": (lambda path: Distillation(NO_TARGET, lora(1, 4), init_from=path), "1x1x1 is not larger than"),
    "video": (lambda path: TextToVideo(NO_TARGET, lora(4), init_from=path), "takes images of"),
    "nothing there": (lambda path: Distillation(NO_TARGET, lora(4), init_from="no.ckpt"), "no checkpoint at no.ckpt"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_has_no_meaning_is_refused(trained: tuple[TargetSettings, Path], change: str) -> None:
    make, complaint = REFUSED[change]
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        built(make(str(trained[1])))


@pytest.mark.parametrize(
    "flex, complaint",
    [
        (lora(4), "holds weights that all its sizes share, and recipe 'lora' puts adapters on a frozen plain model"),
        (FlexSettings([4], underlying_patch_size=8), "has underlying_patch_size 1x4x4, and flex asks for 1x8x8"),
        (FlexSettings([4], size_norms=False), "has size_norms True, and flex asks for False"),
    ],
)
def test_shared_weights_stay_what_they_are(
    make_target: MakeTarget, tmp_path: Path, flex: FlexSettings, complaint: str
) -> None:
    student = flexify(make_target("DiT-Tiny/2").build(), [4])
    path = save_checkpoint(student, tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match=complaint):
        built(ClassConditional(NO_TARGET, flex, init_from=str(path)))


def test_a_plain_model_belongs_to_the_target(tmp_path: Path) -> None:
    path = save_checkpoint(create_model("DiT-Tiny/2", input_size=8, num_classes=10), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="holds a plain model: give it as target.checkpoint"):
        built(ClassConditional(NO_TARGET, FlexSettings([4]), init_from=str(path)))
