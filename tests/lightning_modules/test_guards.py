"""A step that is not finite is as if its update had not happened, bit for bit, and is named; a hopeless run ends."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from callbacks.ema import EMA
from callbacks.preemption import Preemption
from datamodules.digits import DigitsDataModule
from lightning_modules import ClassConditional
from lightning_modules.guards import DivergedError, StepGuard
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings

STEPS, BAD = 6, 3


class Digits(DigitsDataModule):
    """Some training batches have a nan; they are counted from 0."""

    def __init__(self, bad: Sequence[int] = (), **options: Any) -> None:
        super().__init__(**options)
        self.bad, self.count = bad, 0

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if self.trainer is not None and self.trainer.training:
            self.count += 1
            if self.count - 1 in self.bad:
                batch["x"] = batch["x"].clone()
                batch["x"][0] = torch.nan
        return batch


class Student(ClassConditional):
    """Some steps have a finite loss and a gradient that is not."""

    def __init__(
        self,
        target: TargetSettings,
        steep: Sequence[int] = (),
        fused: bool = False,
        decay: Literal["constant", "cosine"] = "constant",
        **options: Any,
    ) -> None:
        settings = OptimizerSettings(lr=1e-2, weight_decay=0.1, decay=decay, warmup_steps=2)
        super().__init__(target, FlexSettings([4]), optimizer=settings, **options)
        self.steep, self.fused = steep, fused

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step in self.steep:
            loss = loss + (self.model.blocks[0].attn.qkv.weight.sum() * 0).sqrt()
        return loss

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        for group in found["optimizer"].param_groups:
            group["fused"] = self.fused or None
        return found


class Held(Student):
    """The law's other side: at one step the optimizer is not called, and all goes on."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.global_step == BAD:
            optimizer_closure()
            self.step_skipped = torch.tensor(1.0, device=self.device)  # for the average
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


@pytest.fixture
def run(fit: Callable[..., pl.Trainer], make_target: Callable[..., TargetSettings]) -> Callable[..., dict[str, Any]]:
    """What is left of a run: everything that training goes on from."""

    def train(kind: type[Student] = Student, bad: Sequence[int] = (), module: Any = None, **options: Any) -> Any:
        names = ("steep", "fused", "matching")
        given = {name: options.pop(name) for name in names if name in options}
        student = kind(make_target("DiT-Tiny/2", num_classes=10), decay="cosine", **given)
        callbacks = [average := EMA(0.8, warmup=True), *options.pop("callbacks", [])]
        trainer = fit(student, STEPS, data=Digits(bad, batch_size=8), callbacks=callbacks, **options)
        state = trainer.optimizers[0].state_dict()
        return {
            "weights": dict(student.named_parameters()),
            "moments": {f"{n}.{key}": value for n, one in state["state"].items() for key, value in one.items()},
            "average": average.average,
            "rest": (state["param_groups"], average.num_updates, trainer.global_step, trainer.fit_loop.state_dict()),
        }

    return train


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("weights", "moments", "average"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items()), part
    assert one["rest"] == other["rest"]


CASES = {
    "loss": {"bad": [BAD]},
    "gradient": {"steep": [BAD]},
    "clipped": {"bad": [BAD], "gradient_clip_val": 0.5},
    "clipped by value": {"steep": [BAD], "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "first micro-batch": {"bad": [2 * BAD], "accumulate_grad_batches": 2},
    "second micro-batch": {"bad": [2 * BAD + 1], "accumulate_grad_batches": 2},
    "half precision": {"bad": [BAD], "precision": "bf16-mixed", "gradient_clip_val": 0.5},
    "fused": {"bad": [BAD], "fused": True, "gradient_clip_val": 0.5},
    "fused, gradient": {"steep": [BAD], "fused": True, "accumulate_grad_batches": 2},
    "matching": {"bad": [BAD], "matching": MatchingSettings(0.5, chain={"4": 1, "2": 1}, num_timesteps=50)},
}
ON_CUDA: dict[str, Any] = {"accelerator": "cuda", "deterministic": True}
CUDA_CASES = [
    pytest.param({**CASES[name], **ON_CUDA}, marks=pytest.mark.gpu, id=f"{name}, cuda")
    for name in ("clipped", "fused", "fused, gradient")
]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("options", [*(pytest.param(case, id=name) for name, case in CASES.items()), *CUDA_CASES])
def test_a_step_that_is_not_finite_is_as_if_its_update_had_not_happened(run: Any, options: dict[str, Any]) -> None:
    clean = {name: value for name, value in options.items() if name not in ("bad", "steep")}
    assert_equal(run(**options), run(Held, **clean))


@pytest.mark.usefixtures("quiet")
def test_what_is_finite_is_as_it_would_be_without_a_guard(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = run()
    monkeypatch.setattr("lightning_modules.base.DiffusionModule.configure_callbacks", lambda self: [])
    assert_equal(guarded, run())


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_counts_and_goes_on_as_if_it_had_not_stopped(
    fit: Any, make_target: Any, tmp_path: Path, fused: bool
) -> None:
    target = make_target("DiT-Tiny/2", num_classes=10)
    found = []
    for stops in ((STEPS,), (BAD + 1, STEPS)):  # also right after the bad step, which the host does not know of yet
        path = None
        for stop in stops:
            student = Student(target, fused=fused)
            data = Digits([BAD], batch_size=8)
            data.count = 0 if path is None else BAD + 1
            trainer = fit(student, stop, data=data, ckpt_path=path, max_epochs=9)
            path = tmp_path / f"{len(found)}.ckpt"
            trainer.save_checkpoint(path)
        found.append((dict(student.named_parameters()), guard_of(trainer).state_dict()))
    (weights, counts), (others, resumed) = found
    assert counts == resumed
    assert counts["skipped"] == 1
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def guard_of(trainer: pl.Trainer) -> StepGuard:
    [guard] = (callback for callback in trainer.callbacks if isinstance(callback, StepGuard))
    return guard


def test_a_step_that_was_left_out_is_counted_and_named(run: Any, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "log", "0")
    with pytest.warns(UserWarning, match=f"step {BAD} was left out, the 1st of this run: at patch size 1x.x. the loss"):
        run(bad=[BAD], logger=logger, log_every_n_steps=1)
    rows = (tmp_path / "log" / "0" / "metrics.csv").read_text().splitlines()
    table = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    assert [(row["step"], row["train/skipped_steps"]) for row in table if row["train/skipped_steps"]] == [
        (str(BAD), "1")
    ]
    assert sum(bool(row["train/grad_norm"]) for row in table) == STEPS


@pytest.mark.parametrize("fused", [False, True])
def test_the_samples_are_those_of_the_micro_batch_with_the_bad_loss(run: Any, fused: bool) -> None:
    seen: list[list[str]] = []

    class Names(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: dict[str, Any], *args: Any) -> None:
            seen.append(batch["names"])

    with pytest.warns(UserWarning, match="was left out") as caught:
        run(bad=[2 * BAD + 1], accumulate_grad_batches=2, callbacks=[Names()], fused=fused)
    said = str(next(warning.message for warning in caught if "left out" in str(warning.message)))
    assert f"of rank 0 ({', '.join(seen[2 * BAD + 1])})" in said
    assert len(set(seen[2 * BAD + 1])) == 8


def test_all_samples_of_a_step_are_named_if_only_its_gradient_is_bad(run: Any) -> None:
    with pytest.warns(UserWarning, match=r"the gradient, though no loss, was not finite of rank 0 \(digit .*, digit "):
        run(steep=[BAD])


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_was_left_out_just_before_a_preemption_is_named_once(
    fit: Any, make_target: Any, tmp_path: Path, fused: bool
) -> None:
    """A fused optimizer's host would have learnt of it in the next step."""

    class Signal(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == BAD:
                os.kill(os.getpid(), signal.SIGTERM)

    target, path = make_target("DiT-Tiny/2", num_classes=10), tmp_path / "last.ckpt"
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=99, save_top_k=0, save_last=True)
    data, options = Digits([BAD], batch_size=8), {"callbacks": [Signal(), Preemption(), saver]}
    with pytest.raises(SystemExit):
        fit(Student(target, fused=fused), STEPS, data=data, enable_checkpointing=True, **options)
    named = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in named] == [BAD]
    data.count = BAD + 1
    trainer = fit(Student(target, fused=fused), STEPS, data=data, ckpt_path=path, callbacks=[Preemption()])
    assert guard_of(trainer).num_skipped == len(named) == 1
    assert (tmp_path / "skipped_steps.jsonl").read_text().splitlines() == named


@pytest.mark.parametrize("fused", [False, True])
def test_too_many_in_a_row_end_the_run_with_its_last_good_state(
    fit: Any, make_target: Any, tmp_path: Path, fused: bool
) -> None:
    target = make_target("DiT-Tiny/2", num_classes=10)
    good = Student(target, fused=fused)
    fit(good, 2, data=Digits(batch_size=8))
    student = Student(target, fused=fused)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DivergedError, match="^3 steps in a row") as raised:
        fit(student, 9, data=Digits(range(2, 99), batch_size=8), callbacks=[StepGuard(max_in_a_row=2)])
    [path] = tmp_path.glob("*.ckpt")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(value, state["state_dict"][name]) for name, value in good.state_dict().items())
    assert state["global_step"] == 5 + fused
    resumed = Student(target, fused=fused)
    trainer = fit(resumed, 8, data=Digits(batch_size=8), ckpt_path=path, callbacks=[StepGuard(max_in_a_row=2)])
    assert guard_of(trainer).num_skipped == 3 + fused


@pytest.mark.usefixtures("quiet")
def test_weights_that_are_not_finite_are_not_saved_as_good(run: Any, tmp_path: Path) -> None:
    class Ruin(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
            if trainer.global_step == 2:
                next(p for p in module.parameters() if p.requires_grad).data.fill_(torch.inf)

    with pytest.raises(DivergedError, match="^3 steps in a row .* nothing was saved: go on from an earlier checkpoint"):
        run(callbacks=[Ruin(), StepGuard(max_in_a_row=2)])
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.usefixtures("quiet")
def test_steps_in_a_row_are_counted_anew_after_a_good_one(run: Any) -> None:
    guard = StepGuard(max_in_a_row=2)
    run(bad=[0, 1, 3, 4], callbacks=[guard])
    assert (guard.num_skipped, guard.in_a_row) == (4, 0)


def test_spikes_are_counted_logged_and_warned_of_seldom(run: Any, tmp_path: Path) -> None:
    class Spike(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Tensor) -> None:
            if trainer.global_step in (3, 4):
                loss.register_hook(lambda gradient: gradient * 1000)

    guard = StepGuard(spike_window=2, warn_every_n_steps=9)
    logger = CSVLogger(tmp_path, "log", "0")
    with pytest.warns(UserWarning, match="gradient of step 3 .* times the median") as caught:
        run(callbacks=[Spike(), guard], logger=logger, log_every_n_steps=1)
    assert sum("times the median" in str(warning.message) for warning in caught) == 1
    assert guard.num_spikes >= 1
    assert "train/grad_norm_spike" in (tmp_path / "log" / "0" / "metrics.csv").read_text()


@pytest.mark.parametrize(
    "options", [{"max_in_a_row": 0}, {"spike_factor": 1.0}, {"spike_window": 0}, {"warn_every_n_steps": 0}]
)
def test_numbers_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        StepGuard(**options)


class StepChanges(pl.Callback):
    """For each step, whether the guard left it out and whether any weight or average changed."""

    def __init__(self, average: EMA) -> None:
        self.average, self.steps = average, list[tuple[bool, bool]]()
        self._before: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self._before = self._state(module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        same = all(map(torch.equal, self._before, self._state(module)))
        self.steps.append((bool(module.step_skipped), not same))

    def _state(self, module: Any) -> list[Tensor]:
        return [value.clone() for value in [*module.parameters(), *self.average.average.values()]]


@pytest.mark.gpu
@pytest.mark.usefixtures("quiet")
def test_a_loss_scaler_and_the_guard_leave_out_the_same_steps(fit: Any, make_target: Any) -> None:
    student, average = Student(make_target("DiT-Tiny/2", num_classes=10)), EMA(0.8)
    changes = StepChanges(average)
    data = Digits([BAD], batch_size=8)
    options = {"accelerator": "cuda", "precision": "16-mixed", "gradient_clip_val": 0.5, "max_epochs": 9}
    trainer = fit(student, 3 * STEPS, data=data, callbacks=[average, changes], **options)
    assert all(skipped != changed for skipped, changed in changes.steps[1:])  # the average begins with the first
    assert changes.steps[BAD][0]
    assert guard_of(trainer).num_skipped == sum(skipped for skipped, _ in changes.steps) < len(changes.steps)
    assert all(value.isfinite().all() for value in student.parameters())


def test_a_loss_scaler_may_lower_its_scale_first() -> None:
    from types import SimpleNamespace

    from lightning_modules.guards import _is_scaling_down

    def trainer(scale: float | None) -> Any:
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        return SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))

    assert [_is_scaling_down(trainer(scale)) for scale in (None, 65536.0, 1.0)] == [False, True, False]
