"""Every shipped config, alone and with each trainer config, becomes a module, data and a trainer."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy

from callbacks.ema import EMA
from callbacks.preemption import Preemption
from callbacks.rank_errors import RankErrors
from flexidit import create_model, flexify, load_checkpoint
from flexidit.cli import main
from flexidit.commands.training import CLI
from flexidit.variants import variant_config
from lightning_modules.base import DiffusionModule
from lightning_modules.checkpoint_io import BackgroundCheckpointIO, StreamingCheckpointIO
from lightning_modules.settings import TargetSettings
from lightning_modules.sharded_strategy import ShardedStrategy

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "trainer")
TRAINERS = sorted((CONFIGS / "trainer").glob("*.yaml"))
STRATEGIES = {
    "cpu": (SingleDeviceStrategy, None),
    "ddp": (DDPStrategy, None),
    "fsdp": (ShardedStrategy, "job"),
    "hsdp": (ShardedStrategy, "node"),
    "slurm": (SingleDeviceStrategy, None),  # comes after one of the others
    "background": (SingleDeviceStrategy, None),  # likewise
}
XL2 = CONFIGS / "imagenet" / "class_conditional_xl2.yaml"


def ids(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def parse(folder: Path, *configs: Path) -> Any:
    """Everything that the command would make, on a CPU, evaluators without their weights."""
    args = []
    for index, path in enumerate(configs):
        copy = folder / f"{index}.yaml"
        copy.write_text(yaml.safe_dump(without_files(yaml.safe_load(path.read_text()))))
        args += ["-c", str(copy)]
    return CLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        run=False,
        args=[*args, "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1"],
    )


def without_files(value: Any) -> Any:
    """Feature extractors read their weights when they are made; a classifier without weights stands in."""
    if isinstance(value, list):
        return [without_files(item) for item in value]
    if not isinstance(value, dict):
        return value
    if str(value.get("class_path", "")).startswith("flexidit.metrics.features."):
        return {"class_path": "flexidit.metrics.digit_classifier.DigitClassifier"}
    return {key: without_files(item) for key, item in value.items()}


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", [*RECIPES, *TRAINERS], ids=ids)
def test_a_config_opens_with_its_command_hardware_and_expected_result(path: Path) -> None:
    head = "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert f"configs/{ids(path)}.yaml" in head
    assert "# Hardware: " in head
    assert "Expected: " in head


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_a_recipe_is_complete(path: Path, tmp_path: Path) -> None:
    cli = parse(tmp_path, path)
    trainer = cli.trainer
    assert isinstance(cli.model, DiffusionModule)
    assert isinstance(trainer.logger, TensorBoardLogger)
    folder = Path(trainer.default_root_dir)
    assert Path(trainer.logger.log_dir) == folder  # one run, one folder: `--ckpt_path last` finds it again
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    assert all(Path(saver.dirpath or "").resolve() == (folder / "checkpoints").resolve() for saver in savers)
    assert [bool(saver.save_last) for saver in savers] == [False] * (len(savers) - 1) + [
        True
    ]  # written last, found first
    assert all(trainer.max_steps % saver._every_n_train_steps == 0 for saver in savers)  # the end of the run is saved
    assert [type(callback) for callback in trainer.callbacks].count(EMA) == 1


@pytest.mark.parametrize("path", [path for path in RECIPES if "bf16-mixed" in path.read_text()], ids=ids)
def test_a_long_run_keeps_states_to_fall_back_to(path: Path) -> None:
    """What needs a GPU is long; how much of the disk that takes is what the recipe says."""
    config = yaml.safe_load(path.read_text())
    callbacks = config["trainer"]["callbacks"]
    kept, last = (ModelCheckpoint(**c["init_args"]) for c in callbacks if "ModelCheckpoint" in c["class_path"])
    assert kept.state_key != last.state_key
    assert (kept.save_top_k, kept.monitor, kept.filename) == (-1, None, "{step}")
    every, of_last = kept._every_n_train_steps, last._every_n_train_steps
    assert every % of_last == 0 and every > of_last
    told = re.search(r"# Kept: (\d+) states of (\S+) GB", path.read_text())
    assert told is not None
    assert 2 <= int(told[1]) == config["trainer"]["max_steps"] // every <= 10
    model = config["model"]["init_args"]
    if "variant" in model["target"]:
        with torch.device("meta"):
            trained = create_model(model["target"]["variant"], **model["target"].get("overrides", {}))
            trained = flexify(trained, **model["flex"]) if "flex" in model else trained
        size = 16 * sum(p.numel() for p in trained.parameters() if p.requires_grad)  # with average and two moments
        assert float(told[2]) == round(size / 1e9, 1)


@pytest.mark.parametrize("trainer_config", TRAINERS, ids=ids)
@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_any_trainer_config_follows_any_recipe(path: Path, trainer_config: Path, tmp_path: Path) -> None:
    assert list(yaml.safe_load(trainer_config.read_text())) == ["trainer"]
    trainer = parse(tmp_path, path, trainer_config).trainer
    strategy: Any = trainer.strategy
    writer = BackgroundCheckpointIO if trainer_config.stem == "background" else StreamingCheckpointIO
    assert isinstance(strategy.checkpoint_io, writer)
    kind, shared = STRATEGIES[trainer_config.stem]
    assert type(strategy) is kind
    assert getattr(strategy, "shard_over", None) == shared
    if isinstance(strategy, ParallelStrategy):
        assert strategy._timeout == timedelta(minutes=30)
    assert isinstance(trainer.callbacks[0], RankErrors)
    assert [type(callback) for callback in trainer.callbacks].count(Preemption) == 1


def test_the_xl_recipe_is_table_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(XL2), "-c", str(CONFIGS / "trainer" / "ddp.yaml"), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert (model["optimizer"]["lr"], model["optimizer"]["weight_decay"]) == (1e-4, 0.0)
    assert (model["flex"]["recipe"], model["matching"]["num_timesteps"]) == ("shared", 250)
    average = next(c["init_args"] for c in trainer["callbacks"] if c["class_path"] == "callbacks.ema.EMA")
    assert (average["decay"], average["every_n_steps"]) == (0.9999, 1)
    assert config["data"]["init_args"]["batch_size"] * trainer["devices"] == 256
    assert trainer["precision"] == "bf16-mixed"
    sampled = next(c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("FIDFlops"))
    assert (sampled["solver"], sampled["num_sampling_steps"]) == ("ddpm", 250)


@pytest.mark.parametrize(("name", "rank"), [("pixart_256", 32), ("pixart_1024", 32), ("emu", 64)])
def test_the_text_to_image_recipes_are_table_5(name: str, rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    path, ddp = CONFIGS / "text_to_image" / f"{name}.yaml", CONFIGS / "trainer" / "ddp.yaml"
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(path), "-c", str(ddp), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert (model["optimizer"]["lr"], model["optimizer"]["weight_decay"]) == (8e-4, 1e-2)
    assert (model["flex"]["recipe"], model["flex"]["rank"], trainer["gradient_clip_val"]) == ("lora", rank, 0.02)
    average = next(c["init_args"] for c in trainer["callbacks"] if c["class_path"] == "callbacks.ema.EMA")
    assert (average["decay"], average["every_n_steps"]) == (0.9999, 1)
    batch_size = config["data"]["init_args"]["batch_size"]
    assert batch_size * trainer["devices"] * trainer["accumulate_grad_batches"] == 512


@pytest.mark.parametrize("name", ["video_dit_4_9b", "wan_1_3b", "wan_14b"])
def test_the_text_to_video_recipes_are_table_5(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, fsdp = CONFIGS / "text_to_video" / f"{name}.yaml", CONFIGS / "trainer" / "fsdp.yaml"
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(path), "-c", str(fsdp), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    model, trainer, data = config["model"]["init_args"], config["trainer"], config["data"]["init_args"]
    assert (model["optimizer"]["lr"], model["optimizer"]["weight_decay"]) == (8e-4, 1e-2)
    assert (model["flex"]["recipe"], model["flex"]["rank"], trainer["gradient_clip_val"]) == ("lora", 64, 0.02)
    assert {"1x4x4", "2x2x2"} <= set(model["flex"]["patch_sizes"])
    average = next(c["init_args"] for c in trainer["callbacks"] if c["class_path"] == "callbacks.ema.EMA")
    assert (average["decay"], average["every_n_steps"]) == (0.9999, 1)
    batch = data["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"]
    assert batch == (512 if name == "video_dit_4_9b" else 64)
    if model["gather_dtype"] == "bfloat16":
        assert trainer["precision"] == "bf16-mixed"
    target = variant_config(model["target"]["variant"])
    by = (8, 8, 8) if name == "video_dit_4_9b" else (4, 8, 8)  # downscale of the autoencoder
    pixels = (data["num_frames"], *data["size"])
    assert target.input_size == tuple(math.ceil(side / factor) for side, factor in zip(pixels, by, strict=True))


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_a_recipe_s_model_exists(path: Path) -> None:
    settings = TargetSettings(**yaml.safe_load(path.read_text())["model"]["init_args"]["target"])
    if settings.variant is None:
        assert settings.checkpoint  # of another recipe
        return
    with torch.device("meta"):
        model = create_model(settings.variant, **settings.overrides)
    if "cifar10" in path.parts:
        assert 20e6 < sum(p.numel() for p in model.parameters()) < 35e6


@pytest.mark.parametrize(
    ("first", "second", "folder", "sizes"),
    [
        ("pretraining", "class_conditional", "runs/quickstart_class_conditional", "1x2x2 1x4x4"),
        ("text_to_image_pretrain", "text_to_image_distill", "runs/quickstart_text_to_image_distill", "1x2x2 1x4x4"),
        (
            "text_to_video_pretrain",
            "text_to_video_distill",
            "runs/quickstart_text_to_video_distill",
            "1x4x4 2x4x4 1x6x6",
        ),
    ],
)
def test_the_quick_start_s_recipes_follow_one_another(first: str, second: str, folder: str, sizes: str) -> None:
    short = [
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.callbacks.init_args.every_n_train_steps=2",
    ]
    for name in (first, second):
        assert main(["fit", "-c", str(CONFIGS / "quickstart" / f"{name}.yaml"), *short]) == 0
    student = load_checkpoint(f"{folder}/checkpoints/last.ckpt")
    assert [size.name for size in student.patch_sizes] == sizes.split()
    assert list(Path(f"{folder}/samples").glob("*.png"))
