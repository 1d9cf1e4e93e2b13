"""What it saves to compute keys and values of captions once for a sampling run, not at every step.

    python benchmarks/caption_cache.py --model TextDiT-S/2 --threads 1 --json caption_cache.json
    python benchmarks/caption_cache.py --model PixArt-XL/2-256 --depth 4 --steps 5

At each patch size the same samples are drawn with the cache and without, in turn, repetition by repetition, so that a
busy machine slows down both alike; medians are reported, as a ratio to no cache, beside that of the FLOPs. Weights and
captions are random: a time does not depend on them. The last column is the largest difference of the samples, relative
to their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from flexidit import create_model, flexify
from flexidit.conditions import Captions
from flexidit.flops import trace_cost
from flexidit.patch_size import PatchSize
from flexidit.sampling.sampler import Sampler
from flexidit.sampling.schedule import PatchSchedule


@dataclass(frozen=True)
class Measurement:
    """One patch size, one number of images."""

    patch_size: str
    num_images: int
    milliseconds: float
    """Of one step of all images with the cache; what is computed once is spread over the steps. Median."""
    latency: float
    """Relative to no cache, as are the FLOPs."""
    flops: float
    difference: float


def make_student(args: argparse.Namespace) -> Any:
    """A student with random weights, on its device, in evaluation mode."""
    torch.manual_seed(0)
    overrides = {"input_size": args.input_size} | ({} if args.depth is None else {"depth": args.depth})
    student = flexify(create_model(args.model, **overrides), [args.weak])
    for parameter in student.requires_grad_(False).parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)  # not its own, with which every prediction is zero
    return student.to(args.device, getattr(torch, args.dtype)).eval()


def make_captions(student: Any, num_images: int) -> Captions:
    """As long as the model reads them."""
    shape = (num_images, student.config.caption_length)
    embeddings = torch.randn(*shape, student.config.caption_channels)
    return Captions(embeddings, torch.ones(shape, dtype=torch.bool)).to(student.pos_embed.device)


def run(sampler: Sampler, y: Captions) -> tuple[float, Tensor]:
    """Seconds, and the samples."""
    synchronize(y.device)
    start = perf_counter()
    samples = sampler(y, generator=torch.Generator().manual_seed(0))
    synchronize(y.device)
    return perf_counter() - start, samples


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it works on its own."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure(student: Any, size: PatchSize, num_images: int, args: argparse.Namespace) -> Measurement:
    """With the cache and without."""
    y, schedule = make_captions(student, num_images), PatchSchedule.constant(size, args.steps)
    samplers = {
        cache: Sampler(student, "ddim", schedule=schedule, cfg_scale=4.5, cache_captions=cache)
        for cache in (True, False)
    }
    samples = {cache: run(sampler, y)[1] for cache, sampler in samplers.items()}  # also warms up
    times: dict[bool, list[float]] = {cache: [] for cache in samplers}
    for _ in range(args.repetitions):
        for cache, sampler in samplers.items():
            times[cache].append(run(sampler, y)[0])
    seconds = {cache: statistics.median(values) for cache, values in times.items()}
    flops = {cache: trace_cost(student, sampler.trace, captions="once").total for cache, sampler in samplers.items()}
    return Measurement(
        patch_size=size.name,
        num_images=num_images,
        milliseconds=1e3 * seconds[True] / args.steps,
        latency=seconds[True] / seconds[False],
        flops=flops[True] / flops[False],
        difference=((samples[True] - samples[False]).abs().max() / samples[False].std()).item(),
    )


def table(measurements: list[Measurement]) -> str:
    """One line a measurement, ratios first."""
    lines = [f"{'images':>6}  {'patch size':>10} {'latency':>8} {'FLOPs':>7} {'ms a step':>10} {'difference':>11}"]
    lines += [
        f"{m.num_images:>6}  {m.patch_size:>10} {m.latency:>8.3f} {m.flops:>7.3f} {m.milliseconds:>10.2f} "
        f"{m.difference:>11.1e}"
        for m in measurements
    ]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="TextDiT-S/2")
    parser.add_argument("--weak", type=PatchSize.parse, default=4, help="the other patch size (default: 4)")
    parser.add_argument("--input-size", type=int, default=32, help="side of the latent (default: 32, for 256 pixels)")
    parser.add_argument("--depth", type=int, help="number of blocks (default: the model's own)")
    parser.add_argument("--steps", type=int, default=10, help="of a sampling run (default: 10)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], metavar="N", help="numbers of images")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's choice)")
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="torch.compile, in this mode")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    return parser.parse_args()


def setting(args: argparse.Namespace) -> dict[str, object]:
    """What a time means nothing without."""
    on_gpu = args.device.type == "cuda"
    return {
        "model": args.model,
        "depth": args.depth,
        "input_size": args.input_size,
        "steps": args.steps,
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
        torch.compiler.reset()
        for size in student.patch_sizes:
            print(f"{num_images} images, {size.name} ...", file=sys.stderr)
            measurements.append(measure(student, size, num_images, args))
    print(table(measurements))
    if args.json is not None:
        record = {"setting": setting(args), "measurements": [asdict(m) for m in measurements]}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
