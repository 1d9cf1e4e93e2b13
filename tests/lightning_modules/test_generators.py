"""The global generators in a checkpoint: plain values that bring back every stream, and another number of processes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.generators import (
    RunGenerators,
    gather_generators,
    read_generators,
    restore_generators,
    write_generators,
)

CPU = torch.device("cpu")


def draw() -> list[float]:
    """From all generators; one normal number leaves a second one behind in two of them."""
    normal = [random.gauss(0, 1), float(np.random.randn()), torch.randn(()).item()]
    return [*normal, random.random(), float(np.random.rand()), torch.rand(()).item()]


def scramble(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _isolated() -> object:
    before = read_generators(CPU)
    yield
    write_generators(before, CPU)


@pytest.mark.parametrize("drawn", [0, 1])
def test_states_survive_a_checkpoint_and_bring_back_all_streams(tmp_path: Path, drawn: int) -> None:
    scramble(1)
    for _ in range(drawn):
        draw()
    torch.save(gather_generators(read_generators(CPU)), tmp_path / "states.pt")
    expected = [draw() for _ in range(3)]
    scramble(2)
    restore_generators(torch.load(tmp_path / "states.pt", weights_only=True), CPU, rank=0, world_size=1, key=(0, 5))
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("saved", [0, 3])
def test_on_another_number_of_processes_all_start_anew_and_it_is_said(saved: int) -> None:
    def start(rank: int, step: int) -> list[float]:
        with pytest.warns(UserWarning, match="anew: the checkpoint holds (none|those of 3 processes) and this"):
            restore_generators([read_generators(CPU)] * saved, CPU, rank=rank, world_size=2, key=(0, step))
        return draw()

    first = start(0, 5)
    scramble(3)
    assert start(0, 5) == first  # a function of seed, step and rank
    assert start(1, 5) != first
    assert start(0, 6) != first


class Drawing(pl.LightningModule):
    """Draws from the global generators in training and in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.generators = nn.Linear(1, 1), RunGenerators()
        self.drawn: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.append(torch.rand(()).item())
        return self.layer(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("judged", self.layer(batch).sum() + torch.rand(()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_start(self) -> None:
        self.generators.start(self, key=(0, self.global_step))

    def on_train_batch_end(self, *_: Any) -> None:
        self.generators.end_step(self)

    def on_validation_model_eval(self) -> None:
        self.generators.enter_validation(self)
        super().on_validation_model_eval()

    def on_validation_end(self) -> None:
        self.generators.leave_validation(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["generators"] = self.generators.save(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.generators.load(checkpoint["generators"])


def test_a_checkpoint_that_validation_decides_on_holds_the_generators_of_before_it(tmp_path: Path) -> None:
    """Lightning's callback saves it before the module can put them back."""

    def fit(ckpt_path: Path | None = None) -> list[float]:
        scramble(4)
        saver = ModelCheckpoint(tmp_path, "{step}", "judged", save_top_k=-1, enable_version_counter=False)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=6, val_check_interval=2, check_val_every_n_epoch=None,
            num_sanity_val_steps=0, logger=False, callbacks=[saver], enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        module = Drawing()
        loaders = [DataLoader(torch.zeros(8, 1), generator=torch.Generator()) for _ in range(2)]  # type: ignore[arg-type]
        trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)
        return module.drawn

    whole = fit()
    assert fit(tmp_path / "step=4.ckpt") == whole[4:]
