"""Communication in closed form: laws of rings and strategies, and the volumes that FSDP2 itself moves."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flexidit import create_model, flexify
from flexidit.conditions import Captions
from lightning_modules.sharding import shard

WEAK, RANK, WORLD_SIZE = ("1x4x4", "2x2x2"), 4, 2


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["lora", "full"])
def model(scale: ModuleType, request: pytest.FixtureRequest) -> Any:
    return scale.model_of("VideoDiT-Tiny", request.param, WEAK, RANK)


def test_hsdp_of_one_node_is_fsdp_and_of_nodes_of_one_gpu_is_ddp(scale: ModuleType, model: Any) -> None:
    cluster = scale.Cluster()
    one_node = [scale.step_of(model, kind, 8, cluster) for kind in ("fsdp", "hsdp")]
    assert one_node[0] == replace(one_node[1], strategy="fsdp")
    single = replace(cluster, gpus_per_node=1)
    copied = [scale.step_of(model, kind, 16, single) for kind in ("ddp", "hsdp")]
    assert copied[0].reduce == pytest.approx(copied[1].reduce)
    assert copied[0].sent == pytest.approx(copied[1].sent)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_twice_the_bandwidth_halves_what_is_not_latency(scale: ModuleType, model: Any, strategy: str) -> None:
    cluster = scale.Cluster(latency=0, inter_latency=0)
    faster = replace(cluster, intra=2 * cluster.intra, inter=2 * cluster.inter)
    slow, fast = (scale.step_of(model, strategy, 64, one) for one in (cluster, faster))
    assert (fast.gather, fast.reduce) == pytest.approx((slow.gather / 2, slow.reduce / 2))
    assert (fast.sent, fast.compute, fast.state) == (slow.sent, slow.compute, slow.state)
    endless = replace(cluster, intra=float("inf"), inter=float("inf"))
    assert scale.step_of(model, strategy, 64, endless).exposed == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_what_is_exposed_is_communication_and_all_of_it_beside_no_work(
    scale: ModuleType, model: Any, strategy: str
) -> None:
    cluster = scale.Cluster()
    step = scale.step_of(model, strategy, 64, cluster)
    assert 0 < step.exposed <= step.gather + step.reduce
    idle = scale.step_of(model, strategy, 64, replace(cluster, flops=float("inf")))
    assert idle.exposed == pytest.approx(idle.gather + idle.reduce)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(scale: ModuleType) -> None:
    group = scale.Group(8, 1e9, 1e-5)
    assert group.all_reduce(1e6) == 2 * group.gather(1e6)
    assert group.gather(8e9) == pytest.approx(7 * 1e-5 + 7)  # each sends its eighth, and hands on six of the others
    assert scale.Group(1, 1e9, 1e-5).gather(1e6) == 0


def test_gpus_fill_nodes(scale: ModuleType) -> None:
    with pytest.raises(ValueError, match="12 GPUs do not fill nodes of 8"):
        scale.groups_of("fsdp", 12, scale.Cluster())


class Moved(TorchDispatchMode):
    """Bytes of the whole tensors that collectives gather to and reduce from."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            whole = args[0] if name == "_allgather_base_" else args[1]
            self.bytes[name] += whole.numel() * whole.element_size()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """A process group whose collectives move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    yield
    dist.destroy_process_group()


def step(student: Any, recipe: str) -> None:
    config = student.config
    shape = (1, config.caption_length)
    y = Captions(torch.randn(*shape, config.caption_channels), torch.ones(shape, dtype=torch.bool))
    x, t = torch.randn(1, config.in_channels, *config.input_size), torch.full((1,), 500.0)
    if recipe == "lora":
        with torch.no_grad():
            student(x, t, y, patch_size=student.base_patch_size)
    size = student.patch_sizes[-1] if recipe == "lora" else student.base_patch_size
    student(x, t, y, patch_size=size).sum().backward()


@pytest.mark.usefixtures("fake_ranks")
@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_volumes_are_those_that_fsdp_moves(scale: ModuleType, recipe: str) -> None:
    plain = create_model("VideoDiT-Tiny")
    student = flexify(plain, WEAK, "lora", rank=RANK) if recipe == "lora" else plain
    student.gradient_checkpointing = True
    shard(student, init_device_mesh("cpu", (WORLD_SIZE, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))
    with CommDebugMode() as counted, Moved() as moved:
        step(student, recipe)
    model = scale.model_of("VideoDiT-Tiny", recipe, WEAK, RANK)
    counts = {str(op).rpartition(".")[2]: number for op, number in counted.get_comm_counts().items()}
    gathers = len(model.passes) * model.depth
    assert counts.get("_allgather_base_", 0) - gathers in (1, 2)  # the rest, once or for each prediction
    assert gathers * model.block * 4 <= moved.bytes["_allgather_base_"]
    assert moved.bytes["_allgather_base_"] == pytest.approx(4 * (gathers * model.block + model.outside), rel=0.2)
    used = sum(p.numel() for p in student.parameters() if p.grad is not None)
    assert moved.bytes["_reduce_scatter_base_"] == pytest.approx(4 * used, rel=0.02)
    assert used <= model.trained


def test_the_table_is_written(scale: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.json"
    scale.main(["--model", "VideoDiT-Tiny", "--gpus", "8", "16", "--recipe", "lora", "--json", str(out)])
    record = json.loads(out.read_text())
    assert [(s["strategy"], s["gpus"]) for s in record["steps"]["lora"]] == [
        (kind, gpus) for gpus in (8, 16) for kind in ("ddp", "fsdp", "hsdp")
    ]
    assert "hsdp" in capsys.readouterr().out
