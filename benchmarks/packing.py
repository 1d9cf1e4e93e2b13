"""Latency and FLOPs of every way to make the two predictions of a guided step (paper, appendix B.2, Fig. 12).

    python benchmarks/packing.py --model DiT-XL/2 --batch-sizes 1 4 16 64 --device cuda --dtype bfloat16 --compile
    python benchmarks/packing.py --model DiT-S/2 --batch-sizes 1 4 8 --threads 2 --json packing.json

All ways are timed in one run, in turn, repetition by repetition, so that a busy machine slows down each of them alike;
medians are reported, as ratios to ``separate``. Weights are random: a time does not depend on them. The last column is
the largest difference to the predictions of ``separate``, relative to their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import get_args

import torch
from torch import Tensor

from flexidit import create_model, flexify
from flexidit.flops import batch_flops
from flexidit.models.dit import DiT
from flexidit.patch_size import PatchSize
from flexidit.sampling.packing import PACKINGS, PackingName
from flexidit.token_layout import Segment

NAMES: tuple[PackingName, ...] = get_args(PackingName)


@dataclass(frozen=True)
class Measurement:
    """One way at one batch size."""

    packing: str
    num_images: int
    milliseconds: float
    """Median."""
    latency: float
    """Relative to "separate", as are the FLOPs."""
    flops: float
    gflops: float
    difference: float


def make_student(args: argparse.Namespace) -> DiT:
    """A student with random weights, on its device, in evaluation mode."""
    torch.manual_seed(0)
    overrides = {"input_size": args.input_size} | ({} if args.depth is None else {"depth": args.depth})
    student = flexify(create_model(args.model, **overrides), [args.weak], args.recipe, rank=args.rank)
    for parameter in student.requires_grad_(False).parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)  # not DiT's own, with which every prediction is zero
    return student.to(args.device, getattr(torch, args.dtype)).eval()


def make_ways(student: DiT, num_images: int) -> dict[str, Callable[[], list[Tensor]]]:
    """For each name, what makes the two predictions of one step."""
    device, dtype = student.pos_embed.device, student.pos_embed.dtype
    x = torch.randn(num_images, student.in_channels, *student.input_size, device=device, dtype=dtype)
    t = torch.full((num_images,), 500, device=device)
    y = torch.arange(num_images, device=device) % student.num_classes
    sizes = list(student.patch_sizes)

    def separate() -> list[Tensor]:
        return [student(x, t, y, patch_size=size) for size in sizes]

    def packed(name: str) -> list[Tensor]:
        return student([x, x], [t, t], [y, y], patch_size=sizes, packing=PACKINGS[name])

    return {name: separate if name == "separate" else partial(packed, name) for name in NAMES}


def step_flops(student: DiT, name: str, num_images: int) -> int:
    """What one step costs, padding and masked keys included."""
    sizes = student.patch_sizes
    if name == "separate":
        return sum(batch_flops(student, size, num_images, merged=False) for size in sizes)
    layout = PACKINGS[name]([Segment(size, num_images, size.num_tokens(student.input_size)) for size in sizes])
    return sum(batch_flops(student, size, num_images, layout.work(i), merged=False) for i, size in enumerate(sizes))


def run(way: Callable[[], list[Tensor]], device: torch.device) -> tuple[float, list[Tensor]]:
    """Seconds, and the predictions."""
    torch.compiler.cudagraph_mark_step_begin()
    synchronize(device)
    start = perf_counter()
    predictions = way()
    synchronize(device)
    return perf_counter() - start, [prediction.clone() for prediction in predictions]


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it works on its own."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def measure(student: DiT, num_images: int, repetitions: int, warmup: int) -> list[Measurement]:
    """All ways at one batch size."""
    ways, device = make_ways(student, num_images), student.pos_embed.device
    predictions = {name: run(way, device)[1] for name, way in ways.items()}
    for _ in range(warmup):
        for way in ways.values():
            run(way, device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            times[name].append(run(way, device)[0])
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    flops = {name: step_flops(student, name, num_images) for name in ways}
    return [
        Measurement(
            name,
            num_images,
            milliseconds=1e3 * medians[name],
            latency=medians[name] / medians["separate"],
            flops=flops[name] / flops["separate"],
            gflops=flops[name] / 1e9,
            difference=difference(predictions[name], predictions["separate"]),
        )
        for name in ways
    ]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest absolute difference in units of the standard deviation of ``theirs``."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
    return max(((a - b).abs().max() / b.std()).item() for a, b in pairs)


def table(measurements: list[Measurement]) -> str:
    """One line a measurement, ratios first."""
    lines = [f"{'images':>6}  {'packing':<9} {'latency':>8} {'FLOPs':>7} {'ms':>10} {'GFLOPs':>10} {'difference':>11}"]
    lines += [
        f"{m.num_images:>6}  {m.packing:<9} {m.latency:>8.3f} {m.flops:>7.3f} {m.milliseconds:>10.2f} "
        f"{m.gflops:>10.2f} {m.difference:>11.1e}"
        for m in measurements
    ]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2", help="its base size makes the conditional prediction")
    parser.add_argument("--weak", type=PatchSize.parse, default=4, help="patch size that guides (default: 4)")
    parser.add_argument("--input-size", type=int, default=32, help="side of the latent (default: 32, for 256 pixels)")
    parser.add_argument("--depth", type=int, help="number of blocks (default: the model's own)")
    parser.add_argument("--recipe", choices=["shared", "lora"], default="shared")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters, which are not merged (recipe lora)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="numbers of images")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's choice)")
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="torch.compile, in this mode")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    return parser.parse_args()


def setting(args: argparse.Namespace) -> dict[str, object]:
    """What a time means nothing without."""
    on_gpu = args.device.type == "cuda"
    return {
        "model": args.model,
        "depth": args.depth,
        "weak": str(PatchSize.parse(args.weak)),
        "input_size": args.input_size,
        "recipe": args.recipe,
        "device": torch.cuda.get_device_name(args.device) if on_gpu else args.device.type,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "compile": args.compile,
        "torch": torch.__version__,
        "repetitions": args.repetitions,
    }


def main() -> None:
    """Measure, print, and write if asked to."""
    args = parse_arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    student = make_student(args)
    if args.compile:
        student.compile(dynamic=False, mode=args.compile)
    print(", ".join(f"{name} {value}" for name, value in setting(args).items()))
    measurements: list[Measurement] = []
    for num_images in args.batch_sizes:
        torch.compiler.reset()  # a graph for each way and batch size would exceed the limit of recompilations
        print(f"{num_images} images ...", file=sys.stderr)
        measurements += measure(student, num_images, args.repetitions, args.warmup)
    print(table(measurements))
    if args.json is not None:
        record = {"setting": setting(args), "measurements": [asdict(m) for m in measurements]}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
