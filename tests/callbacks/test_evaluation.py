"""Sampling leaves weights and random state as they were; precision and folders are the trainer's."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from callbacks.ema import EMA
from callbacks.evaluation import autocast_dtype, codec_of, log_directory, model_of, sampling, tensorboards


class Toy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)


def make_trainer(root: Path, **kwargs: object) -> Trainer:
    return Trainer(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False, **kwargs)


def test_averaged_weights_inside_raw_ones_after(tmp_path: Path) -> None:
    module, ema = Toy(), EMA(decay=0.5)
    ema.update(module)
    module.model.weight.data.add_(1.0)
    raw, state = module.model.weight.detach().clone(), torch.get_rng_state()
    with sampling(make_trainer(tmp_path, callbacks=[ema], logger=False), module):
        assert torch.equal(module.model.weight, ema.average["model.weight"])
        torch.randn(3)
        assert not torch.is_grad_enabled()
    assert torch.equal(module.model.weight, raw)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_an_average_the_weights_are_the_raw_ones(tmp_path: Path) -> None:
    module = Toy()
    raw = module.model.weight.detach().clone()
    with sampling(make_trainer(tmp_path, logger=False), module):
        assert torch.equal(module.model.weight, raw)


def test_mixed_precision_is_for_the_model(tmp_path: Path) -> None:
    assert autocast_dtype(make_trainer(tmp_path, precision="bf16-mixed", logger=False)) == torch.bfloat16
    assert autocast_dtype(make_trainer(tmp_path, precision="32-true", logger=False)) is None


def test_pictures_go_where_the_loggers_are(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")
    trainer = make_trainer(tmp_path, logger=[board, table])
    assert tensorboards(trainer) == [board.experiment]
    assert log_directory(trainer) == Path(board.log_dir)
    assert log_directory(make_trainer(tmp_path, logger=False)) == tmp_path


def test_a_module_without_model_or_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="Toy has no attribute 'codec'; use PixelCodec"):
        codec_of(Toy())
    with pytest.raises(ValueError, match="LightningModule has no attribute 'model'"):
        model_of(LightningModule())
