"""A signal in the middle of sampling breaks it off; the run that continues has the pictures and points of a whole."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.breaking_off import BrokenOffError, Pace
from callbacks.ema import EMA
from callbacks.fid_flops import FIDFlops
from callbacks.preemption import PREEMPTED, Preemption
from callbacks.sample_grid import SampleGrid
from flexidit import create_model, flexify
from flexidit.latents import PixelCodec
from flexidit.metrics.curve_points import read_csv

STEPS, SAMPLING_STEPS = 6, 3


class Means(nn.Module):
    """Two features of a picture."""

    name = "means"
    fingerprint = "means/0"

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.stack([pixels.flatten(1).mean(1), pixels.flatten(1).std(1)], 1)


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(6, 1, 4, 4), batch_size=2)  # all alike: this loader cannot be resumed

    def val_dataloader(self) -> DataLoader[Any]:
        samples = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(2))
        return DataLoader([{"x": x, "y": torch.tensor(0)} for x in samples], batch_size=4)


class Toy(LightningModule):
    """Counts the calls of its model that sampling makes; is sent a signal in one of them."""

    def __init__(self, signalled_at: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"input_size": 4, "depth": 1, "hidden_size": 16, "num_heads": 2, "in_channels": 1}
        self.model = flexify(create_model("DiT-S/2", num_classes=3, **sizes), patch_sizes=[4])
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.codec = PixelCodec(1)
        self.signalled_at, self.num_calls = signalled_at, 0
        self.model.register_forward_hook(self._count)

    def _count(self, model: nn.Module, *_: Any) -> None:
        self.num_calls += not model.training
        if not model.training and self.num_calls == self.signalled_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self.model(x, torch.zeros(2), torch.zeros(2).long(), patch_size=4).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/mean", batch["x"].mean() + next(self.model.parameters()).sum(), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


def fit(folder: Path, *callbacks: Any, signalled_at: int = 0, continues: bool = False, **options: Any) -> Toy:
    """Validates after every second step; saves at the end, and at a signal."""
    module, every_n_steps = options.pop("module", None) or Toy(signalled_at), options.pop("every_n_steps", 1)
    saver = ModelCheckpoint(folder, every_n_train_steps=STEPS, save_top_k=0, save_last=True)
    trainer = InFolder(
        default_root_dir=folder, max_steps=STEPS, accelerator="cpu", devices=1, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=None, val_check_interval=2,
        logger=CSVLogger(folder, "log", "1" if continues else "0"), log_every_n_steps=1,
        callbacks=[EMA(0.5), *callbacks, Preemption(every_n_steps=every_n_steps), saver], **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(), ckpt_path=folder / "last.ckpt" if continues else None, weights_only=False)
    return module


class InFolder(Trainer):
    """Starts of a run have one folder for pictures, as in the recipes, and a log each."""

    @property
    def log_dir(self) -> str:  # type: ignore[override]
        return self.default_root_dir


def stopped(folder: Path, *callbacks: Any, **options: Any) -> int:
    """The step that was saved by a run that a signal has ended."""
    with pytest.raises(SystemExit) as stop:
        fit(folder, *callbacks, **options)
    assert stop.value.code == PREEMPTED
    return int(torch.load(folder / "last.ckpt", weights_only=True)["global_step"])


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("samples/*.png"))}


def points(folder: Path) -> list[tuple[str, float, float]]:
    return [(point.model, point.budget, point.frechet) for point in read_csv(folder / "fid_flops.csv")]


def grid(**options: Any) -> SampleGrid:
    return SampleGrid(**{"num_sampling_steps": SAMPLING_STEPS, "num_columns": 2, "every_n_epochs": None} | options)


def curve(**options: Any) -> FIDFlops:
    arguments = {"budgets": (1.0, 0.64), "num_samples": 7, "num_sampling_steps": SAMPLING_STEPS, "batch_size": 4}
    return FIDFlops(Means(), **arguments | options)


def equal_weights(one: Toy, other: Toy) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "schedule, options, saved",
    [
        ({"every_n_steps": 3}, {}, 3),
        ({"every_n_steps": 1}, {"every_n_steps": 4}, 1),  # though it asks seldom
        ({"every_n_epochs": 1}, {}, 3),
        ({"every_n_steps": 2}, {"accumulate_grad_batches": 2}, 2),
    ],
)
def test_a_picture_that_was_broken_off_is_drawn_by_the_run_that_continues(
    schedule: dict[str, int], options: dict[str, Any], saved: int, tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", grid(**schedule), **options)
    run = tmp_path / "run"
    assert stopped(run, grid(**schedule), signalled_at=2, **options) == saved
    assert pictures(run) == {}
    continued = fit(run, grid(**schedule), continues=True, **options)
    assert pictures(run) == pictures(tmp_path / "whole")
    assert continued.num_calls == whole.num_calls
    assert equal_weights(continued, whole)


def test_nothing_of_what_was_begun_goes_on_after_the_call_in_which_the_signal_came(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, grid(every_n_steps=3), curve(), module=(module := Toy(signalled_at=2)))
    assert module.num_calls == 2


def test_a_measurement_in_a_validation_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", curve(every_n_validations=2))
    of_one_point = whole.num_calls // 4  # two measurements of two budgets: after step 4 and at the end
    run = tmp_path / "run"
    assert stopped(run, curve(every_n_validations=2), signalled_at=of_one_point + 2) == 4
    assert points(run) == points(tmp_path / "whole")[:1]
    continued = fit(run, curve(every_n_validations=2), continues=True)
    assert points(run) == points(tmp_path / "whole")
    assert continued.num_calls == 3 * of_one_point
    assert equal_weights(continued, whole)
    assert logged(run, "val/fid@0.64") == logged(tmp_path / "whole", "val/fid@0.64")
    assert logged(run, "val/mean") == logged(tmp_path / "whole", "val/mean")


def test_what_the_end_of_a_fit_lacks_is_done_by_the_next_start_and_only_that(tmp_path: Path) -> None:
    """Lightning does nothing in a run that has done its last step."""
    whole = fit(tmp_path / "whole", grid(every_n_steps=4), curve())
    of_a_picture = whole.num_calls - (of_a_curve := fit(tmp_path / "curve", curve()).num_calls)
    run = tmp_path / "run"
    assert stopped(run, grid(every_n_steps=4), curve(), signalled_at=of_a_picture + of_a_curve // 2 + 1) == STEPS
    assert pictures(run) == pictures(tmp_path / "whole")
    assert points(run) == points(tmp_path / "whole")[:1]
    before = (run / "last.ckpt").stat().st_mtime_ns
    assert fit(run, grid(every_n_steps=4), curve(), continues=True).num_calls == of_a_curve - of_a_curve // 2
    assert points(run) == points(tmp_path / "whole")
    assert logged(run, "val/fid@0.64") == logged(tmp_path / "whole", "val/fid@0.64")
    assert fit(run, grid(every_n_steps=4), curve(), continues=True).num_calls == 0
    assert (run / "last.ckpt").stat().st_mtime_ns == before


def test_a_signal_in_the_last_step_leaves_the_sampling_to_the_next_start(tmp_path: Path) -> None:
    fit(tmp_path / "whole", grid(every_n_steps=STEPS), curve())
    run = tmp_path / "run"
    assert stopped(run, grid(every_n_steps=STEPS), curve(), signalled_at=1) == STEPS
    assert pictures(run) == {} and points(run) == []
    assert logged(run, "val/mean") == logged(tmp_path / "whole", "val/mean")  # the step's validation was not broken off
    stopped(run, grid(every_n_steps=STEPS), curve(), continues=True, signalled_at=3)
    fit(run, grid(every_n_steps=STEPS), curve(), continues=True)
    assert pictures(run) == pictures(tmp_path / "whole")
    assert points(run) == points(tmp_path / "whole")


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """By all starts of a run, each value once."""
    found: dict[tuple[int, float], None] = {}
    for file in sorted(folder.glob("log/*/metrics.csv")):
        header, *rows = (line.split(",") for line in file.read_text().splitlines())
        for row in rows:
            cells = dict(zip(header, row, strict=True))
            if cells.get(name):
                found[int(cells["step"]), float(cells[name])] = None
    return list(found)


def test_a_signal_is_heeded_after_any_number_of_calls() -> None:
    preemption, pace, trainer = Preemption(), Pace(), SimpleNamespace(validating=False)
    for _ in range(5000):
        preemption.heed(trainer, pace)  # type: ignore[arg-type]
    preemption._noted.note(signal.SIGTERM)
    for _ in range(2):
        with pytest.raises(BrokenOffError):
            preemption.heed(trainer, pace)  # type: ignore[arg-type]


def test_ranks_ask_about_once_a_second_however_long_calls_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("callbacks.breaking_off.time.monotonic", lambda: now[0])
    pace, asked = Pace(), []
    for seconds in [0.01] * 1000 + [3.0] * 100:
        now[0] += seconds
        if pace.is_due():
            asked.append(now[0])
            pace.adapt(pace.elapsed())
    waits = [later - earlier for earlier, later in pairwise(asked)]
    fast, slow = waits[: sum(time <= 10 for time in asked) - 1], waits[-10:]
    assert max(fast) <= 1.01
    assert len(fast) < 20
    assert slow == [3.0] * 10
