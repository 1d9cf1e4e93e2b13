"""Images and FLOPs are summed per step, divided by training time only, and the device is not waited for each step."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import throughput
from callbacks.throughput import Throughput, batch_size, peak_bf16_flops


class Toy(LightningModule):
    """Steps of 10 ms whose cost alternates between 4e9 and 1e9 FLOPs a sample; validation of 200 ms; its own clock."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.net = nn.Linear(1, 1)
        self.step_flops = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.step_flops = 4_000_000_000 if batch_idx % 2 == 0 else 1_000_000_000
        self.seconds += 0.01
        return self.net(batch["x"]).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seconds += 0.2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()
    monkeypatch.setattr(throughput, "perf_counter", lambda: toy.seconds)
    return toy


def fit(root: Path, callback: Throughput, module: LightningModule, **kwargs: Any) -> None:
    loader = DataLoader([{"x": torch.zeros(1)}] * 160, batch_size=8)
    trainer = Trainer(default_root_dir=root, accelerator="cpu", devices=1, max_epochs=1, logger=False,
                      callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
                      enable_checkpointing=False, **kwargs)  # fmt: skip
    trainer.fit(module, loader, DataLoader([{"x": torch.zeros(1)}]))


def test_sums_the_flops_of_each_step(tmp_path: Path, module: Toy) -> None:
    callback = Throughput(every_n_steps=10, peak_flops=1e12)
    fit(tmp_path, callback, module, limit_val_batches=0)
    assert callback.last == pytest.approx({
        "throughput/images_per_s": 800.0,  # 8 images in 10 ms
        "throughput/tflops_per_s": 800 * 2.5e9 / 1e12,  # the mean of 4 and 1
        "throughput/mfu": 800 * 2.5e9 / 1e12,
    })  # fmt: skip


def test_validation_is_not_on_the_clock(tmp_path: Path, module: Toy) -> None:
    callback = Throughput(every_n_steps=20)
    fit(tmp_path, callback, module, val_check_interval=5, num_sanity_val_steps=1)
    assert callback.last["throughput/images_per_s"] == pytest.approx(800.0)


def test_accumulated_batches_all_count(tmp_path: Path, module: Toy) -> None:
    callback = Throughput(every_n_steps=5)
    fit(tmp_path, callback, module, limit_val_batches=0, accumulate_grad_batches=4)
    assert callback.last["throughput/images_per_s"] == pytest.approx(800.0)


def test_one_sync_a_window(tmp_path: Path, module: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[torch.device] = []
    monkeypatch.setattr(throughput, "_synchronize", syncs.append)
    fit(tmp_path, Throughput(every_n_steps=10), module, limit_val_batches=0)
    assert len(syncs) == 1 + 2 * 2  # the start, then the end and the restart of two windows, over 20 steps


def test_a_module_without_flops_gets_images_only(tmp_path: Path) -> None:
    class Plain(Toy):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.net(batch["x"]).mean()

    plain, callback = Plain(), Throughput(every_n_steps=5, peak_flops=1e12)
    del plain.step_flops
    fit(tmp_path, callback, plain, limit_val_batches=0)
    assert list(callback.last) == ["throughput/images_per_s"]


def test_clips_are_called_clips(tmp_path: Path, module: Toy) -> None:
    class Video(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.step_flops = 1_000_000_000
            module.seconds += 0.01  # its clock is the one that is read
            return self.net(batch.mean((1, 2, 3, 4))[:, None]).mean()

    callback = Throughput(every_n_steps=5)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", devices=1, max_epochs=1, logger=False,
                      callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
                      enable_checkpointing=False)  # fmt: skip
    trainer.fit(Video(), DataLoader(torch.zeros(40, 1, 2, 4, 4), batch_size=4))
    assert callback.last["throughput/clips_per_s"] == pytest.approx(400.0)
    assert "throughput/images_per_s" not in callback.last


def test_peaks_are_dense_and_names_are_whole_words() -> None:
    assert peak_bf16_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_bf16_flops("NVIDIA A10") == 125e12
    assert peak_bf16_flops("NVIDIA H200") == 989.4e12
    assert peak_bf16_flops("NVIDIA H200 NVL") == 835.5e12
    assert peak_bf16_flops("NVIDIA L40S") == 362e12
    assert peak_bf16_flops("Some New Device") is None


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA L4"])
def test_agrees_with_lightnings_table_where_that_is_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_available_flops(torch.device("cuda"), torch.bfloat16)
    assert theirs is not None and peak_bf16_flops(name) == pytest.approx(theirs, rel=0.01)


def test_batch_size_reads_the_usual_forms() -> None:
    x = torch.zeros(5, 2)
    assert [batch_size(b) for b in ({"x": x, "y": x[:, 0]}, (x, x), x)] == [5, 5, 5]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps"):
        Throughput(every_n_steps=0)
