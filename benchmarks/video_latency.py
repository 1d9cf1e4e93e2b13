"""Latency beside FLOPs of one prediction of a text-to-video model in each of its modes, eager and compiled.

    python benchmarks/video_latency.py --model Wan-1.3B --device cuda --dtype bfloat16 --json wan.json
    python benchmarks/video_latency.py --model Wan-1.3B --depth 2 --device cuda --dtype bfloat16
    python benchmarks/video_latency.py --model Wan-Tiny --repetitions 2

Each mode is a plain model of its patch size, as samplers have it with the adapter merged; with --rank the adapter runs
beside the weights. Weights are random: a time does not depend on them. Captions are worked through before the clock
starts, as samplers do it once for all steps, and the FLOPs leave them out, too. All modes and ways are timed in turn,
repetition by repetition; medians are reported. MFU is FLOPs by time by the device's dense bfloat16 peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from callbacks.throughput import peak_bf16_flops
from flexidit import create_model, flexify
from flexidit.conditions import Captions
from flexidit.flops import forward_flops
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize
from flexidit.variants import variant_config

WAYS = ("eager", "compiled")


@dataclass(frozen=True)
class Measurement:
    """One mode, in one way."""

    patch_size: str
    way: str
    num_tokens: int
    tflops: float
    """Of the batch."""
    milliseconds: float
    """Median."""
    fastest: float
    """Milliseconds of the fastest repetition."""
    relative_flops: float
    """To the first mode, as is the latency."""
    relative_latency: float
    mfu: float | None
    """None: the device's peak is not known."""


@dataclass(frozen=True)
class Case:
    """A mode that is ready to run."""

    patch_size: PatchSize
    way: str
    num_tokens: int
    flops: int
    run: Callable[[], Tensor]


def make_model(args: argparse.Namespace, patch_size: PatchSize) -> FlexiTransformer:
    """A model with random weights, made on its device in its type: plain, or with an adapter."""
    config = variant_config(args.model)
    overrides = {"input_size": args.size or config.input_size, "depth": args.depth or config.depth}
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            if args.rank is None or patch_size == config.patch_size:
                model = create_model(args.model, patch_size=patch_size, **overrides)
            else:
                model = flexify(create_model(args.model, **overrides), [patch_size], "lora", rank=args.rank)
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).eval()


def make_case(args: argparse.Namespace, patch_size: PatchSize, way: str) -> Case:
    """A mode with its inputs on the device."""
    model = make_model(args, patch_size)
    config: Any = model.config
    device, dtype = args.device, getattr(torch, args.dtype)
    shape = (args.batch_size, config.caption_length)
    embeddings = torch.randn(*shape, config.caption_channels, device=device, dtype=dtype)
    with torch.no_grad():
        y = model.prepare(Captions(embeddings, torch.ones(shape, dtype=torch.bool, device=device)))
    x = torch.randn(args.batch_size, config.in_channels, *config.input_size, device=device, dtype=dtype)
    t = torch.full((args.batch_size,), 500.0, device=device)
    if way == "compiled":
        model.compile(dynamic=False, mode=args.mode)
    flops = args.batch_size * forward_flops(model, patch_size, merged=args.rank is None, captions="once")
    num_tokens = patch_size.num_tokens(config.input_size)
    return Case(patch_size, way, num_tokens, flops, lambda: model(x, t, y, patch_size=patch_size))


def seconds(case: Case, device: torch.device) -> float:
    """Of one prediction."""
    torch.compiler.cudagraph_mark_step_begin()
    synchronize(device)
    start = perf_counter()
    case.run()
    synchronize(device)
    return perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it works on its own."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[Measurement]:
    """All modes in all ways."""
    cases = []
    for way in args.ways:
        for patch_size in args.modes:
            print(f"{patch_size.name} {way} ...", file=sys.stderr)
            cases.append(make_case(args, patch_size, way))
            for _ in range(args.warmup):
                seconds(cases[-1], args.device)
    times: dict[int, list[float]] = {i: [] for i in range(len(cases))}
    for _ in range(args.repetitions):
        for i, case in enumerate(cases):
            times[i].append(seconds(case, args.device))
    return [measurement(case, times[i], cases[0], times[0], args.device) for i, case in enumerate(cases)]


def measurement(
    case: Case, times: Sequence[float], first: Case, first_times: Sequence[float], device: torch.device
) -> Measurement:
    """What the times of a case say."""
    median = statistics.median(times)
    peak = peak_bf16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Measurement(
        case.patch_size.name,
        case.way,
        case.num_tokens,
        tflops=case.flops / 1e12,
        milliseconds=1e3 * median,
        fastest=1e3 * min(times),
        relative_flops=case.flops / first.flops,
        relative_latency=median / statistics.median(first_times),
        mfu=None if peak is None else case.flops / median / peak,
    )


def table(measurements: Sequence[Measurement]) -> str:
    """One line a measurement."""
    head = f"{'mode':<8} {'way':<9} {'tokens':>7} {'TFLOPs':>9} {'FLOPs':>7} {'latency':>8} {'ms':>10} {'fastest':>10}"
    lines = [f"{head} {'MFU':>6}"]
    for m in measurements:
        mfu = "" if m.mfu is None else f"{m.mfu:.1%}"
        lines.append(
            f"{m.patch_size:<8} {m.way:<9} {m.num_tokens:>7} {m.tflops:>9.3f} {m.relative_flops:>7.3f} "
            f"{m.relative_latency:>8.3f} {m.milliseconds:>10.2f} {m.fastest:>10.2f} {mfu:>6}"
        )
    return "\n".join(lines)


def parse_size(text: str) -> tuple[int, ...]:
    """FxHxW."""
    return tuple(int(side) for side in text.split("x"))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-1.3B", help="a variant of clips")
    parser.add_argument("--size", type=parse_size, metavar="FxHxW", help="latent size (default: the variant's own)")
    parser.add_argument("--depth", type=int, help="number of blocks (default: the variant's own)")
    parser.add_argument(
        "--modes",
        type=PatchSize.parse,
        nargs="+",
        default=[PatchSize.parse(size) for size in ("1x2x2", "2x2x2", "1x4x4")],
        help="patch sizes, of which the first is what others are compared with",
    )
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--mode", default="default", help="of torch.compile")
    parser.add_argument("--rank", type=int, help="leave adapters of this rank unmerged")
    parser.add_argument("--batch-size", type=int, default=1, help="predictions at once; 2 are a guided step")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    return parser.parse_args(arguments)


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What a time means nothing without."""
    config = variant_config(args.model)
    return {
        "model": args.model,
        "size": "x".join(map(str, args.size or config.input_size)),
        "depth": args.depth or config.depth,
        "rank": args.rank,
        "batch_size": args.batch_size,
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
        "dtype": args.dtype,
        "compile": args.mode,
        "torch": torch.__version__,
        "repetitions": args.repetitions,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    args = parse_arguments(arguments)
    print(", ".join(f"{name} {value}" for name, value in setting(args).items()))
    measurements = measure(args)
    print(table(measurements))
    if args.json is not None:
        record = {"setting": setting(args), "measurements": [asdict(m) for m in measurements]}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
