"""One picture when due, one row a budget, the same noise in all, and training none the wiser."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.ema import EMA
from callbacks.sample_grid import SampleGrid
from datamodules.captioned_digits import CaptionedDigitsDataModule
from flexidit import create_model, flexify
from flexidit.latents import PixelCodec


class Toy(LightningModule):
    """A tiny flexible model of 4x4 pixels; its step changes one weight, and draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        target = create_model(
            "DiT-S/2", num_classes=5, input_size=4, depth=1, hidden_size=16, num_heads=2, in_channels=1
        )
        self.model = flexify(target, patch_sizes=[4])
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.codec = PixelCodec(1)
        self.drawn: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        x = torch.ones(1, 1, 4, 4)
        return self.model(x, torch.zeros(1), torch.zeros(1).long(), patch_size=4).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


def fit(root: Path, *callbacks: Any, steps: int = 4, **kwargs: Any) -> Toy:
    module = Toy()
    trainer = Trainer(default_root_dir=root, max_steps=steps, accelerator="cpu", devices=1, callbacks=list(callbacks),
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                      **{"logger": False} | kwargs)  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(2, 1)))
    return module


def grid(**kwargs: Any) -> SampleGrid:
    return SampleGrid(**{"num_sampling_steps": 2, "num_columns": 2} | kwargs)


def pictures(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("samples/*.png"))


def test_drawn_when_due_and_at_the_end(tmp_path: Path) -> None:
    fit(tmp_path / "epochs", grid())
    assert pictures(tmp_path / "epochs") == ["step_00000002.png", "step_00000004.png"]
    fit(tmp_path / "steps", grid(every_n_epochs=None, every_n_steps=3), steps=5, accumulate_grad_batches=2)
    assert pictures(tmp_path / "steps") == ["step_00000003.png", "step_00000005.png"]


def test_tensorboard_gets_the_same_picture(tmp_path: Path) -> None:
    fit(tmp_path, grid(), steps=2, logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    (image,) = events.Images("samples")
    with Image.open(next(tmp_path.rglob("*.png"))) as picture:
        assert (image.width, image.height) == picture.size


def test_rows_share_their_noise_and_differ_in_cost(tmp_path: Path) -> None:
    callback, module = grid(budgets=(1.0, 1.0, 0.64), num_sampling_steps=4), Toy()
    trainer = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    full, again, saved = callback.sample_rows(trainer, module)
    assert torch.equal(full.samples, again.samples)
    assert not torch.equal(full.samples, saved.samples)
    assert (full.label, full.note) == ("budget 1", "100.0% of the FLOPs")
    assert saved.label == "budget 0.64" and 0.5 < float(saved.note.split("%")[0]) / 100 < 0.7


def test_samples_come_from_the_average(tmp_path: Path) -> None:
    callback, ema, module = grid(), EMA(decay=0.0), Toy()
    trainer = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", callbacks=[ema, callback])
    ema.update(module)
    before = callback.sample_rows(trainer, module)[0].samples
    for parameter in module.parameters():
        parameter.data.add_(0.1)
    assert torch.equal(callback.sample_rows(trainer, module)[0].samples, before)
    ema.update(module)
    assert not torch.equal(callback.sample_rows(trainer, module)[0].samples, before)


def test_training_does_not_notice(tmp_path: Path) -> None:
    watched, plain = fit(tmp_path, EMA(), grid()), fit(tmp_path, EMA())
    assert watched.drawn == plain.drawn
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))
    assert watched.model.training


class TextToy(LightningModule):
    """A tiny flexible model of captions; without a null caption of its own if asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        sizes = {"input_size": 8, "in_channels": 1, "depth": 1, "hidden_size": 16, "num_heads": 2}
        target = create_model("TextDiT-Tiny/2", **sizes, **options)
        for parameter in target.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.model, self.codec = flexify(target, patch_sizes=[4], recipe="lora", rank=2), PixelCodec(1)


def text_rows(root: Path, callback: SampleGrid, **options: Any) -> list[Tensor]:
    trainer = Trainer(default_root_dir=root, logger=False, accelerator="cpu")
    trainer.datamodule = CaptionedDigitsDataModule()  # type: ignore[attr-defined]
    torch.manual_seed(0)
    return [row.samples for row in callback.sample_rows(trainer, TextToy(**options))]


def test_captions_are_drawn_the_same_each_time_and_matter(tmp_path: Path) -> None:
    callback = grid(budgets=(1.0, 0.8), num_columns=3)
    rows = text_rows(tmp_path, callback)
    assert [row.shape for row in rows] == [(3, 1, 8, 8)] * 2
    assert all(torch.equal(ours, again) for ours, again in zip(rows, text_rows(tmp_path, callback), strict=True))
    assert callback._column_names() == ["0", "1", "2"]  # their texts are not in the batches
    seven = text_rows(tmp_path, grid(prompts=["a bold seven"]))
    assert not torch.equal(seven[0], text_rows(tmp_path, grid(prompts=["a thin one"]))[0])


def test_prompts_stand_above_their_columns(tmp_path: Path) -> None:
    callback = grid(prompts=["a bold seven", "a thin one " * 20], num_per_class=2)
    assert text_rows(tmp_path, callback)[0].shape == (4, 1, 8, 8)
    first, second, third, fourth = callback._column_names()
    assert first == second == "a bold seven"
    assert third == fourth and third.endswith(" ...") and len(third) <= 80


def test_a_model_without_a_null_caption_is_guided_away_from_the_data_s(tmp_path: Path) -> None:
    assert text_rows(tmp_path, grid(cfg_scale=3.0), null_caption=False)[0].isfinite().all()


def test_labels_spread_over_the_classes() -> None:
    assert grid(num_columns=4)._labels(1000) == [0, 250, 500, 750]
    assert grid(num_columns=8)._labels(3) == [0, 1, 2]
    assert grid(classes=[7, 9], num_per_class=2)._labels(1000) == [7, 7, 9, 9]


def test_a_config_can_hold_it() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(SampleGrid, "grid")
    parsed = parser.parse_object({"grid": {"budgets": [1.0, 0.46], "weak_patch_size": "1x4x4", "classes": [3]}})
    assert parser.instantiate_classes(parsed).grid.budgets == (1.0, 0.46)


@pytest.mark.parametrize("kwargs", [{"budgets": ()}, {"every_n_steps": 0}])
def test_bad_arguments_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least"):
        SampleGrid(**kwargs)


def test_the_picture_shows_the_samples(tmp_path: Path) -> None:
    module = fit(tmp_path, callback := grid(), steps=2)
    trainer = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    image = callback.sample_rows(trainer, module)[0].samples[0, 0]
    levels = ((image + 1) * 127.5).round().to(torch.uint8).numpy().repeat(16, 0).repeat(16, 1)
    with Image.open(next(tmp_path.rglob("*.png"))) as file:
        picture = np.asarray(file)[:, :, 0]
    windows = np.lib.stride_tricks.sliding_window_view(picture, levels.shape)
    assert (windows[::1] == levels).all(axis=(2, 3)).any()
