"""Logged, plotted and written when due; equal on one rank and on two; monitored like any metric."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.ema import EMA
from callbacks.fid_flops import FIDFlops, scalars
from datamodules.captioned_digits import CaptionedDigitsDataModule
from flexidit import create_model, flexify
from flexidit.latents import PixelCodec
from flexidit.metrics import digit_classifier
from flexidit.metrics.curve_points import CurvePoint, read_csv
from flexidit.metrics.digit_classifier import DigitClassifier
from flexidit.metrics.frechet import FeatureStatistics


class Projection(nn.Module):
    """A fixed random projection to four features."""

    name = "random projection"
    fingerprint = "projection/0"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ self.get_buffer("matrix")


class Data(LightningDataModule):
    def batches(self, count: int) -> DataLoader[Any]:
        x = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
        return DataLoader([{"x": image, "y": torch.tensor(0)} for image in x], batch_size=4)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.batches(8)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.batches(12)


class Toy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        target = create_model(
            "DiT-S/2", num_classes=3, input_size=4, depth=1, hidden_size=16, num_heads=2, in_channels=1
        )
        self.model = flexify(target, patch_sizes=[4])
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.codec = PixelCodec(1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch["x"], torch.zeros(4), batch["y"], patch_size=4).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


def make_trainer(root: Path, *callbacks: Any, **kwargs: Any) -> Trainer:
    return Trainer(default_root_dir=root, accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False,
                   enable_model_summary=False, num_sanity_val_steps=1,
                   **{"logger": False, "enable_checkpointing": False, "devices": 1} | kwargs)  # fmt: skip


def curve(**kwargs: Any) -> FIDFlops:
    arguments = {"budgets": (1.0, 0.64), "num_samples": 7, "num_sampling_steps": 2, "batch_size": 4}
    return FIDFlops(Projection(), **arguments | kwargs)


def points_in(root: Path) -> list[CurvePoint]:
    return read_csv(next(root.rglob("fid_flops.csv")))


def test_measured_after_validations_and_at_the_end(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EMA(), curve(every_n_validations=2), max_epochs=3)
    trainer.fit(Toy(), datamodule=Data())
    points = points_in(tmp_path)
    assert [(p.model, p.budget) for p in points] == [
        ("step 4", 1.0), ("step 4", 0.64), ("step 6", 1.0), ("step 6", 0.64),
    ]  # fmt: skip
    assert points[0].reference == "Data val (12 samples)"
    assert trainer.callback_metrics["val/fid@0.64"] == pytest.approx(points[-1].frechet)
    assert trainer.callback_metrics["flops/relative@1"] == 1.0


def test_measured_once_where_the_last_validation_is_the_end(tmp_path: Path) -> None:
    callback = curve(every_n_validations=1)
    make_trainer(tmp_path, callback, max_epochs=2).fit(Toy(), datamodule=Data())
    assert [p.model for p in points_in(tmp_path)] == ["step 2"] * 2 + ["step 4"] * 2


def test_a_checkpoint_can_be_chosen_by_it(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "best", monitor="val/fid@0.64", save_top_k=1)
    trainer = make_trainer(tmp_path, curve(every_n_validations=1), saver, max_epochs=2, enable_checkpointing=True)
    trainer.fit(Toy(), datamodule=Data())
    assert saver.best_model_score == pytest.approx(min(p.frechet for p in points_in(tmp_path) if p.budget == 0.64))


def test_tensorboard_gets_figure_and_scalars(tmp_path: Path) -> None:
    make_trainer(tmp_path, curve(), max_epochs=1, logger=TensorBoardLogger(tmp_path)).fit(Toy(), datamodule=Data())
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    assert events.Images("val/fid_flops")
    points = points_in(tmp_path)
    for point in points:
        assert events.Scalars(f"val/fid@{point.budget:g}")[0].value == pytest.approx(point.frechet)
        assert events.Scalars(f"flops/relative@{point.budget:g}")[0].value == pytest.approx(point.relative_flops)


def test_validate_measures_too(tmp_path: Path) -> None:
    (results,) = make_trainer(tmp_path, curve()).validate(Toy(), datamodule=Data(), verbose=False)
    points = points_in(tmp_path)
    assert results == pytest.approx(scalars(points))
    assert points[0].model == "initial weights"


def test_a_reference_file_and_a_limit(tmp_path: Path) -> None:
    statistics = FeatureStatistics()
    for batch in Data().val_dataloader():
        statistics.update(Projection()(batch["x"]))
    statistics.gaussian().save(tmp_path / "real.npz")
    distances = {}
    for reference in ("val", str(tmp_path / "real.npz"), "train"):
        callback, module = curve(reference=reference), Toy()
        trainer = make_trainer(tmp_path, callback)
        trainer.validate(module, datamodule=Data(), verbose=False)
        distances[reference] = trainer.callback_metrics["val/fid@1"].item()
    assert distances["val"] == pytest.approx(distances[str(tmp_path / "real.npz")])
    assert distances["val"] != distances["train"]
    make_trainer(tmp_path, limited := curve(reference_samples=6)).validate(Toy(), datamodule=Data(), verbose=False)
    assert [reference.statistics.count for reference in limited._references.values()] == [6]


class Captioned(LightningModule):
    """A tiny flexible model of captions of 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"input_size": 8, "in_channels": 1, "depth": 1, "hidden_size": 16, "num_heads": 2}
        self.model, self.codec = flexify(create_model("TextDiT-Tiny/2", **sizes), [4]), PixelCodec(1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass


class Corner(Projection):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels[:, :, :4, :4])


def test_captions_are_those_of_validation_or_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a bold seven\na thin one\n")
    conditions = []
    for name, given in (("val", {}), ("prompts", {"prompts": str(tmp_path / "prompts.txt")})):
        callback = FIDFlops(Corner(), budgets=(1.0, 0.8), num_samples=5, num_sampling_steps=4, batch_size=4, **given)
        trainer = make_trainer(tmp_path / name, callback)
        trainer.validate(Captioned(), datamodule=CaptionedDigitsDataModule(batch_size=8), verbose=False)
        points = points_in(tmp_path / name)
        assert [p.budget for p in points] == [1.0, 0.8]
        conditions.append(points[0].conditions)
    assert conditions[0].startswith("CaptionedDigitsDataModule val (8 prompts")
    assert conditions[1].startswith("prompts (2 prompts")


class RawData(Data):
    """Pixels that the model's latents are still to be made of: here, by halving."""

    def batches(self, count: int) -> DataLoader[Any]:
        x = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
        items = [{"x": image * 2, "y": torch.tensor(0), "index": i, "epoch": 0} for i, image in enumerate(x)]
        return DataLoader(items, batch_size=4)

    def encode_samples(self, batch: dict[str, Any]) -> Tensor:
        return batch["x"] / 2


def test_raw_images_of_the_run_are_encoded_before_they_are_decoded(tmp_path: Path) -> None:
    distances = []
    for data in (Data(), RawData()):
        trainer = make_trainer(tmp_path, curve())
        trainer.validate(Toy(), datamodule=data, verbose=False)
        distances.append(trainer.callback_metrics["val/fid@1"].item())
    assert distances[0] == pytest.approx(distances[1])


def test_the_runs_data_need_a_datamodule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a datamodule; give the path"):
        make_trainer(tmp_path, curve()).validate(Toy(), Data().val_dataloader(), verbose=False)


def test_training_does_not_notice(tmp_path: Path) -> None:
    modules = [Toy(), Toy()]
    for module, callback in zip(modules, (curve(every_n_validations=1), EMA()), strict=True):
        torch.manual_seed(0)
        make_trainer(tmp_path, callback, max_epochs=2).fit(module, datamodule=Data())
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in modules), strict=True))


def test_a_config_can_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digit_classifier, "train_digit_classifier", lambda x, y, seed: DigitClassifier())
    parser = ArgumentParser()
    parser.add_class_arguments(FIDFlops, "curve")
    features = {"class_path": "flexidit.metrics.digit_classifier.digit_features", "init_args": {"seed": 1}}
    parsed = parser.parse_object({"curve": {"features": features, "budgets": [1.0, 0.46]}})
    callback = parser.instantiate_classes(parsed).curve
    assert callback.budgets == (1.0, 0.46)
    assert callback.features(torch.zeros(1, 1, 8, 8)).shape == (1, 64)


@pytest.mark.parametrize("kwargs", [{"budgets": ()}, {"num_samples": 1}, {"every_n_validations": 0}])
def test_bad_arguments_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"or more|at least 1"):
        curve(**kwargs)


def test_a_module_that_is_no_extractor_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is no feature extractor"):
        FIDFlops(nn.Linear(2, 2))


def test_two_ranks_give_the_points_of_one(tmp_path: Path) -> None:
    statistics = FeatureStatistics()
    for batch in Data().val_dataloader():
        statistics.update(Projection()(batch["x"]))
    statistics.gaussian().save(tmp_path / "real.npz")
    for name, kwargs in (("alone", {}), ("both", {"devices": 2, "strategy": "ddp_spawn"})):
        callback = curve(reference=str(tmp_path / "real.npz"))
        make_trainer(tmp_path / name, callback, **kwargs).validate(Toy(), datamodule=Data(), verbose=False)
    alone, both = points_in(tmp_path / "alone"), points_in(tmp_path / "both")
    assert len(both) == 2  # written once
    assert [p.frechet for p in both] == pytest.approx([p.frechet for p in alone], rel=1e-5)
    assert [p.relative_flops for p in both] == [p.relative_flops for p in alone]
