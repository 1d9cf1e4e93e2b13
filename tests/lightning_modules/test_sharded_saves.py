"""What one process does of a save of shards; several, and what goes wrong between them, are in tests/distributed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flexidit.sharded_files import check_sharded, read_sharded
from lightning_modules.checkpoint_io import BackgroundCheckpointIO
from lightning_modules.sharded_saves import save_folder, start_folder
from lightning_modules.snapshots import Snapshots

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def weight(group: None, request: pytest.FixtureRequest) -> DTensor:
    device = request.node.callspec.params["device"] if hasattr(request.node, "callspec") else "cpu"
    mesh = init_device_mesh(device, (1,))
    return distribute_tensor(torch.arange(12.0, device=device).view(4, 3), mesh, [Shard(0)], src_data_rank=None)


@pytest.fixture
def before_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Have something happen before shards are written."""

    def use(act: Callable[[], None]) -> None:
        original = FileSystem.create_stream

        def create(self: Any, path: Any, mode: str) -> Any:
            if Path(path).suffix == ".distcp" and "w" in mode:
                act()
            return original(self, path, mode)

        monkeypatch.setattr(FileSystem, "create_stream", create)

    return use


def alone(writer: Any = None) -> Any:
    """The strategy of one process."""
    return SimpleNamespace(
        is_global_zero=True,
        checkpoint_io=writer,
        _save_distributed_checkpoint=True,
        broadcast=lambda value: value,
        reduce_boolean_decision=lambda value, all: value,
    )


def checkpoint(weight: Tensor) -> dict[str, Any]:
    moments = {"state": {"weight": {"exp_avg": weight + 1}}, "param_groups": [{"params": ["weight"], "lr": 0.1}]}
    return {"state_dict": {"weight": weight}, "optimizer_states": [moments], "epoch": 2, "average": [torch.ones(3)]}


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@DEVICES
def test_a_snapshot_of_a_sharded_tensor_is_its_part_on_the_host(weight: DTensor, device: str) -> None:
    snapshots = Snapshots()
    first = snapshots.take({"weight": weight, "tied": weight})
    assert first["weight"] is first["tied"]
    assert isinstance(first["weight"], DTensor)
    assert first["weight"].placements == weight.placements
    assert first["weight"].device_mesh == weight.device_mesh
    part, before = first["weight"].to_local(), torch.arange(12.0).view(4, 3)
    assert part.device.type == "cpu"
    assert part.is_pinned() is (device == "cuda")
    weight.to_local().add_(1)
    assert torch.equal(part, before)
    second = snapshots.take({"weight": weight, "tied": weight})["weight"].to_local()
    assert second.data_ptr() == part.data_ptr()
    assert torch.equal(second, before + 1)


@DEVICES
def test_training_may_change_all_that_was_copied(
    weight: DTensor, device: str, tmp_path: Path, before_shards: Callable[[Callable[[], None]], None]
) -> None:
    before_shards(lambda: time.sleep(0.2))
    writer, path, trained = BackgroundCheckpointIO(), tmp_path / "last.ckpt", checkpoint(weight)
    average, moments = trained["average"], trained["optimizer_states"][0]
    start_folder(alone(writer), trained, path)
    assert not path.exists()
    with torch.no_grad():
        weight.to_local().zero_()
        moments["state"]["weight"]["exp_avg"].to_local().zero_()
        average[0].zero_()
        moments["param_groups"][0]["lr"] = 0.2
    writer.wait()
    check_sharded(path)
    read = read_sharded(path, with_optimizers=True)
    expected = torch.arange(12.0).view(4, 3)
    assert torch.equal(read["state_dict"]["weight"], expected)
    assert torch.equal(read["optimizer_states"][0]["state"][0]["exp_avg"], expected + 1)
    assert read["optimizer_states"][0]["param_groups"][0]["lr"] == 0.1
    assert torch.equal(read["average"][0], torch.ones(3))
    assert read["epoch"] == 2
    writer.teardown()


def test_a_folder_of_slurm_s_signal_is_waited_for(
    weight: DTensor, tmp_path: Path, before_shards: Callable[[Callable[[], None]], None]
) -> None:
    before_shards(lambda: time.sleep(0.2))
    writer = BackgroundCheckpointIO()
    start_folder(alone(writer), checkpoint(weight), tmp_path / "hpc_ckpt_1.ckpt")
    check_sharded(tmp_path / "hpc_ckpt_1.ckpt")
    writer.teardown()


def test_an_error_names_the_checkpoint_and_leaves_the_one_before_as_it_was(
    weight: DTensor, tmp_path: Path, before_shards: Callable[[Callable[[], None]], None]
) -> None:
    writer, path = BackgroundCheckpointIO(), tmp_path / "last.ckpt"
    start_folder(alone(writer), checkpoint(weight), path)
    writer.wait()
    before_shards(disk_full)
    start_folder(alone(writer), checkpoint(weight), path)
    with pytest.raises(OSError, match="No space left") as raised:
        writer.wait()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
    check_sharded(path)
    assert [inner.name for inner in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_disk_that_is_full_beside_the_shards_is_an_error_with_a_reason(tmp_path: Path) -> None:
    """Lightning writes the rest of a sharded checkpoint with torch.save alone, whose error is a RuntimeError."""

    def write(checkpoint: dict[str, Any], folder: Any) -> None:
        (folder / "meta.pt").symlink_to("/dev/full")
        torch.save(checkpoint, folder / "meta.pt")

    path = tmp_path / "last.ckpt"
    path.mkdir()
    (path / "shard").write_text("of the save before")
    with pytest.raises(OSError, match="its file cannot be written"):
        save_folder(alone(), write, {"weight": torch.zeros(10**6)}, path)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["shard"]
