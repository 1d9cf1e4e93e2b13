"""How long training waits for a save: written at once, in the background, and by Lightning's own writer.

    python benchmarks/checkpoint_stall.py --model DiT-B/2 --folder /scratch --json checkpoint_stall.json
    python benchmarks/checkpoint_stall.py --model DiT-XL/2 --device cuda

A checkpoint holds what a training run's does: weights, their average and both of AdamW's moments. In each repetition
every way saves once, in turn; real training steps go on while one is still being written. Medians are reported: what
the call took, what the file was complete after, how much longer the steps in between took than others, and what all
that cost training together. At the end the file is compared with its own checksums, which is what a resume pays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, time
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from flexidit import create_model
from flexidit.zip_records import check_records
from lightning_modules.checkpoint_io import BackgroundCheckpointIO, StreamingCheckpointIO

WAYS: dict[str, Callable[[], TorchCheckpointIO]] = {
    "lightning": TorchCheckpointIO,
    "streaming": StreamingCheckpointIO,
    "background": BackgroundCheckpointIO,
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
    """A model, its average and its optimizer, with real steps on random data."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        self.model: Any = create_model(args.model, **({} if args.depth is None else {"depth": args.depth}))
        self.model.to(self.device)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.x = torch.randn(args.batch_size, self.model.in_channels, *self.model.input_size, device=self.device)
        self.t = torch.zeros(args.batch_size, device=self.device)
        self.y = torch.zeros(args.batch_size, dtype=torch.long, device=self.device)

    def step(self) -> float:
        """Seconds of one step."""
        started = perf_counter()
        self.optimizer.zero_grad()
        self.model(self.x, self.t, self.y, patch_size=self.model.base_patch_size).square().mean().backward()
        self.optimizer.step()
        self.synchronize()
        return perf_counter() - started

    def checkpoint(self) -> dict[str, Any]:
        """What Lightning puts together; the tensors are those of training."""
        callbacks = {"EMA": {"average": self.average}}
        states = [self.optimizer.state_dict()]
        return {"state_dict": self.model.state_dict(), "callbacks": callbacks, "optimizer_states": states}

    def synchronize(self) -> None:
        """Wait for the device, if it works on its own."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def save_once(training: Training, writer: TorchCheckpointIO, path: Path, idle: float) -> tuple[float, float, float]:
    """Stall, seconds until it is written, and seconds that steps took longer meanwhile."""
    training.synchronize()
    started, clock = perf_counter(), time()
    writer.save_checkpoint(training.checkpoint(), path)
    stall = perf_counter() - started
    steps = []
    while isinstance(writer, BackgroundCheckpointIO) and not path.exists():
        steps.append(training.step())
    writer.teardown()
    return stall, path.stat().st_ctime - clock, sum(step - idle for step in steps)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All ways, in turn."""
    training = Training(args)
    training.step()
    writers = {way: WAYS[way]() for way in args.ways}  # the same for all saves, as in a run
    path, rows, idle = folder / "last.ckpt", {way: [] for way in args.ways}, 0.0
    for _ in range(args.repetitions):
        idle = statistics.median(training.step() for _ in range(args.steps))  # of now: machines are busy in turns
        for way in args.ways:
            path.unlink(missing_ok=True)
            rows[way].append(save_once(training, writers[way], path, idle))
    checked = perf_counter()
    check_records(path)
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "bytes": path.stat().st_size,
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
    lines = [head, f"{'way':<12} {'stall s':>8} {'written s':>10} {'slowdown s':>11} {'cost s':>8}"]
    lines += [
        f"{m['way']:<12} {m['stall']:>8.2f} {m['written']:>10.2f} {m['slowdown']:>11.2f} {m['cost']:>8.2f}"
        for m in record["measurements"]
    ]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-B/2")
    parser.add_argument("--depth", type=int, help="fewer blocks than the model has")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="to know how long one takes while nothing is written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--folder", type=Path, help="on the file system in question; default: the temporary one")
    parser.add_argument("--json", type=Path, help="write the measurements there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        record = measure(args, Path(folder))
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    names = ("model", "depth", "batch_size", "repetitions", "threads")
    setting = {**{name: getattr(args, name) for name in names}, "device": device, "torch": torch.__version__}
    print(table(record))
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, **record}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
