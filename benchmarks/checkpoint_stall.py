"""How long training waits for a save: at once, in the background, by Lightning's own writer; as files and as shards.

    python benchmarks/checkpoint_stall.py --model DiT-B/2 --folder /scratch --json checkpoint_stall.json
    python benchmarks/checkpoint_stall.py --model DiT-XL/2 --device cuda
    python benchmarks/checkpoint_stall.py --model DiT-XL/2 --device cuda --processes 8   # shards only, one GPU each

A checkpoint holds what a training run's does: weights, their average and both of AdamW's moments. In each repetition
every way saves once, in turn; real training steps go on while one is still being written. Medians are reported: what
the call took, what the file was complete after, how much longer the steps in between took than others, and what all
that cost training together. At the end the file is compared with its own checksums, which is what a resume pays.

Shards are those of ``save_distributed_checkpoint: true``: the model is sharded (FSDP2) over the processes, and rank 0
is measured. What it does is what a run does: the strategy's state, the average as its callback saves it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, time
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.device_mesh import init_device_mesh

from callbacks.ema import EMA
from flexidit import create_model
from flexidit.sharded_files import check_sharded
from flexidit.zip_records import check_records
from lightning_modules.checkpoint_files import delete
from lightning_modules.checkpoint_io import BackgroundCheckpointIO, StreamingCheckpointIO
from lightning_modules.sharded_saves import save_folder, start_folder, wait_for_writer
from lightning_modules.sharded_strategy import ShardedStrategy
from lightning_modules.sharding import shard

WAYS: dict[str, Callable[[], TorchCheckpointIO]] = {
    "lightning": TorchCheckpointIO,
    "streaming": StreamingCheckpointIO,
    "background": BackgroundCheckpointIO,
}
SHARDED_WAYS: dict[str, Callable[[], TorchCheckpointIO]] = {
    "sharded": StreamingCheckpointIO,
    "sharded background": BackgroundCheckpointIO,
}


@dataclass(frozen=True)
class Measurement:
    """One way to save, medians in seconds."""

    way: str
    stall: float
    """Of the call itself."""
    written: float
    """From the call until the file is there."""
    slowdown: float
    """Of training steps while it is written, added up."""
    cost: float
    """Stall and slowdown together, the median of their sums."""


class Training:
    """A model, its average and its optimizer, with real steps on random data; saved as one file."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        self.model: Any = create_model(args.model, **({} if args.depth is None else {"depth": args.depth}))
        self.average = EMA()
        self.place()
        self.average.update(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.x = torch.randn(args.batch_size, self.model.in_channels, *self.model.input_size, device=self.device)
        self.t = torch.zeros(args.batch_size, device=self.device)
        self.y = torch.zeros(args.batch_size, dtype=torch.long, device=self.device)

    def place(self) -> None:
        """Move the model to the device."""
        self.model.to(self.device)

    def step(self) -> float:
        """Seconds of one step."""
        started = perf_counter()
        self.optimizer.zero_grad()
        self.model(self.x, self.t, self.y, patch_size=self.model.base_patch_size).square().mean().backward()
        self.optimizer.step()
        self.synchronize()
        return perf_counter() - started

    def checkpoint(self, writer: TorchCheckpointIO) -> dict[str, Any]:
        """What Lightning puts together; the tensors are those of training."""
        states = {"state_dict": self.model.state_dict(), "optimizer_states": [self.optimizer.state_dict()]}
        return {**states, "callbacks": {"EMA": {"average": dict(self.average.average)}}}

    def save(self, writer: TorchCheckpointIO, path: Path) -> None:
        """One save, as a run does it."""
        writer.save_checkpoint(self.checkpoint(writer), path)

    def is_writing(self, writer: TorchCheckpointIO, path: Path) -> bool:
        """Whether the checkpoint is not there yet; the same on all ranks."""
        return isinstance(writer, BackgroundCheckpointIO) and not path.exists()

    def finish(self, writer: TorchCheckpointIO) -> None:
        """End what is written in the background."""
        writer.teardown()

    def synchronize(self) -> None:
        """Wait for the device, if it works on its own."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


class ShardedTraining(Training):
    """The same, sharded over the processes and saved as a folder."""

    def place(self) -> None:
        """Shard the model."""
        self.strategy = ShardedStrategy(save_distributed_checkpoint=True)
        self.strategy.cluster_environment = TorchElasticEnvironment()
        self.strategy.parallel_devices = [self.device] * self.strategy.world_size
        mesh = init_device_mesh(
            self.device.type, (self.strategy.world_size, 1), mesh_dim_names=("data_parallel", "tensor_parallel")
        )
        shard(self.model, mesh)
        self.strategy.model = self.model
        trainer: Any = SimpleNamespace(strategy=self.strategy)
        self.average.setup(trainer, self.model, "fit")

    def checkpoint(self, writer: TorchCheckpointIO) -> dict[str, Any]:
        """What Lightning puts together with such a strategy."""
        self.strategy.checkpoint_io = writer
        weights, moments = self.strategy.lightning_module_state_dict(), self.strategy.optimizer_state(self.optimizer)
        return {"state_dict": weights, "optimizer_states": [moments], "callbacks": {"EMA": self.average.state_dict()}}

    def save(self, writer: TorchCheckpointIO, path: Path) -> None:
        """One save, as a run does it."""
        checkpoint = self.checkpoint(writer)
        if isinstance(writer, BackgroundCheckpointIO):
            start_folder(self.strategy, checkpoint, path)
        else:
            save_folder(self.strategy, self.strategy.save_checkpoint, checkpoint, path)

    def is_writing(self, writer: TorchCheckpointIO, path: Path) -> bool:
        """Whether the checkpoint is not there yet; the same on all ranks."""
        return self.strategy.broadcast(super().is_writing(writer, path))

    def finish(self, writer: TorchCheckpointIO) -> None:
        """End what is written in the background."""
        if error := wait_for_writer(self.strategy):
            raise error


def save_once(training: Training, writer: TorchCheckpointIO, path: Path, idle: float) -> tuple[float, float, float]:
    """Stall, seconds until it is written, and seconds that steps took longer meanwhile."""
    training.synchronize()
    started, clock = perf_counter(), time()
    training.save(writer, path)
    stall = perf_counter() - started
    steps = []
    while training.is_writing(writer, path):
        steps.append(training.step())
    training.finish(writer)
    return stall, path.stat().st_ctime - clock, sum(step - idle for step in steps)


def measure(args: argparse.Namespace, ways: Sequence[str], folder: Path) -> dict[str, Any]:
    """All of these ways, in turn; they are all of files or all of shards."""
    is_sharded = ways[0] in SHARDED_WAYS
    training = ShardedTraining(args) if is_sharded else Training(args)
    training.step()
    writers = {way: (WAYS | SHARDED_WAYS)[way]() for way in ways}  # the same for all saves, as in a run
    rows: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    path, idle = folder / "last.ckpt", 0.0
    for _ in range(args.repetitions):
        idle = statistics.median(training.step() for _ in range(args.steps))  # of now: machines are busy in turns
        for way in ways:
            if os.environ.get("RANK", "0") == "0":
                delete(path)
            rows[way].append(save_once(training, writers[way], path, idle))
            print(f"{way}: {', '.join(f'{seconds:.2f}' for seconds in rows[way][-1])} s", file=sys.stderr)
    checked = perf_counter()
    (check_sharded if is_sharded else check_records)(path)
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "bytes": sum(file.stat().st_size for file in ([*path.iterdir()] if is_sharded else [path])),
        "step": idle,
        "check": perf_counter() - checked,
        "measurements": [asdict(summary(way, values)) for way, values in rows.items()],
    }


def summary(way: str, values: list[tuple[float, float, float]]) -> Measurement:
    """Medians."""
    stall, written, slowdown = (statistics.median(column) for column in zip(*values, strict=True))
    return Measurement(way, stall, written, slowdown, statistics.median(v[0] + v[2] for v in values))


def table(record: dict[str, Any]) -> str:
    """One line a way."""
    head = (
        f"{record['parameters'] / 1e6:.0f} M parameters, a checkpoint of {record['bytes'] / 1e9:.2f} GB, steps of "
        f"{record['step']:.2f} s; its checksums are compared in {record['check']:.2f} s"
    )
    lines = [head, f"{'way':<18} {'stall s':>8} {'written s':>10} {'slowdown s':>11} {'cost s':>8}"]
    lines += [
        f"{m['way']:<18} {m['stall']:>8.2f} {m['written']:>10.2f} {m['slowdown']:>11.2f} {m['cost']:>8.2f}"
        for m in record["measurements"]
    ]
    return "\n".join(lines)


def work(rank: int, args: argparse.Namespace, folder: Path, port: int) -> None:
    """Measure shards as one of the processes; rank 0 writes down what it finds."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
    sizes = {"WORLD_SIZE": args.processes, "LOCAL_WORLD_SIZE": args.processes}
    os.environ |= {name: str(value) for name, value in {**places, **sizes}.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "stall"}
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(rank)
        args.device = f"cuda:{rank}"
    is_cuda = args.device.startswith("cuda")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
    record = measure(args, [way for way in args.ways if way in SHARDED_WAYS], folder)
    if rank == 0:
        (folder / "record.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()


def measure_sharded(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """In processes of their own, of which each starts anew."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (args, folder, port), args.processes)
    return dict(json.loads((folder / "record.json").read_text()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-B/2")
    parser.add_argument("--depth", type=int, help="fewer blocks than the model has")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS | SHARDED_WAYS, help="default: all that N processes can")
    parser.add_argument("--processes", type=int, default=1, help="over which the model is sharded; files take 1")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="to know how long one takes while nothing is written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU, each process")
    parser.add_argument("--folder", type=Path, help="on the file system in question; default: the temporary one")
    parser.add_argument("--json", type=Path, help="write the measurements there")
    args = parser.parse_args(argv)
    args.ways = args.ways or [*(WAYS if args.processes == 1 else ()), *SHARDED_WAYS]
    if args.processes > 1 and not SHARDED_WAYS.keys() >= {*args.ways}:
        parser.error("files are written by one process: leave their ways out, or --processes")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    records = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if files := [way for way in args.ways if way in WAYS]:
            records["files"] = measure(args, files, Path(folder))
            delete(Path(folder) / "last.ckpt")
        if len(files) < len(args.ways):
            records["shards"] = measure_sharded(args, Path(folder))
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    names = ("model", "depth", "batch_size", "processes", "repetitions", "threads")
    setting = {**{name: getattr(args, name) for name in names}, "device": device, "torch": torch.__version__}
    print("\n\n".join(table(record) for record in records.values()))
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, **records}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
