"""``flexidit curve``: quality against FLOPs and against time at several budgets; resumable."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flexidit.commands.curve_report import HEADINGS, table_rows, write_report
from flexidit.commands.evaluator import FEATURES, Evaluator, make_evaluator, sample_shape_of
from flexidit.commands.sampling_setup import (
    Codec,
    LoadedModel,
    add_model_arguments,
    even_batches,
    load_model,
    need_codec,
    parse_numbers,
    pick_codec,
    progress_bar,
    warm_up,
)
from flexidit.files import write_atomically
from flexidit.metrics.curve import Candidate, Evaluation, SamplingSettings, Series, candidates, cost_per_image
from flexidit.metrics.curve_points import CurvePoint, read_csv, write_csv
from flexidit.metrics.features import FeatureExtractor

HELP = "quality against FLOPs and against time at several budgets: csv, json, png, html; an interrupted run continues"
EXAMPLE = (
    "flexidit curve student.safetensors --budgets 1.0,0.8,0.6,0.46 --num-samples 10000 "
    "--reference imagenet/train --vae sd-vae-ft-ema --cfg-scale 1.5 --out curve"
)

ORDERS: dict[str, Series] = {
    "weak_first": "weak first",
    "weak_last": "weak last",
    "fewer_steps": "fewer steps",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_arguments(parser)
    parser.add_argument("--budgets", default="1.0,0.8,0.6,0.46", metavar="LIST", help="default: %(default)s")
    parser.add_argument("--order", default="weak_first", metavar="LIST", help=f"of {', '.join(ORDERS)}")
    parser.add_argument("--seeds", default="0", metavar="LIST", help="a point each: 0,1,2 (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=10_000, metavar="N", help="a point (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=250, metavar="N", help="denoising steps (default: %(default)s)")
    parser.add_argument("--weak", metavar="SIZE", help="patch size of the cheap steps (default: the largest)")
    parser.add_argument("--solver", default="ddpm", help="ddpm, ddim, dpm++ or sa (default: %(default)s)")
    parser.add_argument("--cfg-scale", type=float, default=1.5, metavar="X", help="1: none (default: %(default)s)")
    parser.add_argument("--guidance-channels", type=int, metavar="N", help="guide the first N (official DiT: 3)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--reference", required=True, help=".npz of statistics (mu, sigma), a folder of images, or 'digits'"
    )
    parser.add_argument(
        "--features", metavar="NAME", help=f"{', '.join(FEATURES)} (default: inception; digits: digits)"
    )
    parser.add_argument("--feature-weights", type=Path, metavar="FILE", help="of the feature network")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, and to continue in")
    parser.add_argument("--json", action="store_true", help="print what curve.json holds")


@dataclass(frozen=True)
class Task:
    """One point to measure."""

    candidate: Candidate
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        """What decides the samples: series that meet in one schedule share its point."""
        return str(self.candidate.schedule), self.seed


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, then draw everything.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used.
    """
    loaded = load_model(args)
    tasks = _tasks(args, loaded)
    settings = _sampling_settings(args, loaded)
    for task in tasks:  # refuses an impossible solver or guidance before anything runs
        cost_per_image(loaded.model, task.candidate.schedule, settings)
    codec = need_codec(pick_codec(loaded.model, args.vae, loaded.device), loaded.model)
    shape = sample_shape_of(loaded.model, codec)
    evaluator = make_evaluator(
        args.features, args.feature_weights, args.reference, shape, loaded.device, args.num_samples
    )
    evaluation = Evaluation(
        model=loaded.model,
        codec=codec,
        features=evaluator.features,
        reference=evaluator.reference,
        settings=settings,
        full_steps=args.steps,
        classifier=evaluator.classifier,
        model_name=loaded.name,
    )
    record = _record(args, loaded, codec, evaluator)
    header = {"settings": record, "floor": evaluator.floor}
    points = _resume(args.out, record)
    args.out.mkdir(parents=True, exist_ok=True)
    _save(args.out, header, points)
    todo = _missing(tasks, points)
    if todo:
        _warm_up(args, loaded, todo)
    for point in _measure(evaluation, todo, points, show=not args.json):
        points.append(point)
        _save(args.out, header, points)
    write_report(args.out, header, points)
    print(json.dumps(_payload(header, points), indent=2) if args.json else _describe(points, evaluator, args.out))
    return 0


def _tasks(args: argparse.Namespace, loaded: LoadedModel) -> list[Task]:
    """Every seed of every budget of every order, one whole curve after the other."""
    budgets = parse_numbers(args.budgets, float, "--budgets")
    seeds = parse_numbers(args.seeds, int, "--seeds")
    names = args.order.split(",")
    for name in names:
        if name not in ORDERS:
            raise ValueError(f"unknown order {name!r}; give one or more of {', '.join(ORDERS)}")
    found = [
        candidate
        for name in names
        for candidate in candidates(loaded.model, budgets, args.steps, ORDERS[name], args.weak, loaded.merged)
    ]
    return [Task(candidate, seed) for seed in seeds for candidate in found]


def _sampling_settings(args: argparse.Namespace, loaded: LoadedModel) -> SamplingSettings:
    if args.num_samples < 2 or args.batch_size < 1:
        raise ValueError(
            f"a point needs 2 samples or more in batches of 1 or more, got --num-samples {args.num_samples} "
            f"--batch-size {args.batch_size}"
        )
    return SamplingSettings(
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        solver=args.solver,
        cfg_scale=args.cfg_scale,
        guidance_channels=args.guidance_channels,
        merged=loaded.merged,
        autocast=loaded.autocast,
    )


def _record(args: argparse.Namespace, loaded: LoadedModel, codec: Codec, evaluator: Evaluator) -> dict[str, Any]:
    """What all points of one curve share; a run continues only where all of it is the same."""
    return {
        "model": loaded.name,
        "num_samples": args.num_samples,
        "steps": args.steps,
        "solver": args.solver,
        "cfg_scale": args.cfg_scale,
        "guidance_channels": args.guidance_channels,
        "weak": args.weak,
        "reference": evaluator.reference.description,
        "evaluator": evaluator.features.name,
        "fingerprint": evaluator.features.fingerprint,
        "codec": codec.fingerprint,
        "device": loaded.device_name,
        "precision": loaded.precision,
        "batch_size": args.batch_size,
        "merged": loaded.merged,
        "compiled": loaded.is_compiled,
    }


def _resume(out: Path, record: Mapping[str, Any]) -> list[CurvePoint]:
    """Points that an interrupted run left.

    Raises:
        ValueError: they were measured under other settings, or something else lies there.
    """
    file = out / "curve.json"
    if not file.is_file():
        return []
    try:
        old = json.loads(file.read_text())["settings"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not a curve of this command; move it away, or give another --out") from None
    for name in {**record, **old}:
        if old.get(name) != record.get(name):
            raise ValueError(
                f"{out} holds a curve with {name}={old.get(name)} and this run has {name}={record.get(name)}, so that "
                "its points would not compare; give another --out"
            )
    return read_csv(out / "curve.csv")


def _missing(tasks: Sequence[Task], points: Sequence[CurvePoint]) -> list[Task]:
    present = {(point.series, point.budget, point.schedule, point.seed) for point in points}
    return [task for task in tasks if (task.candidate.series, task.candidate.budget, *task.key) not in present]


def _warm_up(args: argparse.Namespace, loaded: LoadedModel, todo: Sequence[Task]) -> None:
    steps = [step for task in todo for step in task.candidate.schedule]
    batch_size = even_batches(args.num_samples, args.batch_size)
    warm_up(loaded, steps, batch_size, cfg_scale=args.cfg_scale, guidance_channels=args.guidance_channels)


def _measure(
    evaluation: Evaluation, todo: Sequence[Task], done: Sequence[CurvePoint], show: bool
) -> Iterator[CurvePoint]:
    """The missing points, each as soon as it is known; one schedule and seed is sampled once for all its series."""
    known = {(point.schedule, point.seed): point for point in done}
    total = sum(_cost(evaluation, task) for task in {task.key: task for task in todo if task.key not in known}.values())
    with progress_bar("measuring", total, enabled=show) as advance:
        for task in todo:
            series, budget = task.candidate.series, task.candidate.budget
            if task.key not in known:
                known[task.key] = _measure_one(evaluation, task, advance)
            yield replace(known[task.key], series=series, budget=budget)


def _measure_one(evaluation: Evaluation, task: Task, advance: Callable[[float], None]) -> CurvePoint:
    settings, num_samples = replace(evaluation.settings, seed=task.seed), evaluation.settings.num_samples
    cost = _cost(evaluation, task)
    features = CountedFeatures(evaluation.features, lambda count: advance(cost * count / num_samples))
    return replace(evaluation, settings=settings, features=features).measure(task.candidate)


def _cost(evaluation: Evaluation, task: Task) -> float:
    """FLOPs of all samples of a point."""
    per_image = cost_per_image(evaluation.model, task.candidate.schedule, evaluation.settings)
    return per_image * evaluation.settings.num_samples


class CountedFeatures:
    """A feature extractor that reports how many images have passed: the progress inside a point of hours."""

    def __init__(self, features: FeatureExtractor, on_images: Callable[[int], None]) -> None:
        self.features, self.on_images = features, on_images
        self.name, self.fingerprint = features.name, features.fingerprint

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D)."""
        result = self.features(pixels)
        self.on_images(len(pixels))
        return result


def _payload(header: Mapping[str, Any], points: Sequence[CurvePoint]) -> dict[str, Any]:
    return {**header, "points": [asdict(point) for point in points]}


def _save(out: Path, header: Mapping[str, Any], points: Sequence[CurvePoint]) -> None:
    """The points so far; a later run continues from the csv, if the settings in the json are its own."""
    write_csv(points, out / "curve.csv")
    write_atomically(out / "curve.json", (json.dumps(_payload(header, points), indent=2) + "\n").encode())


def _describe(points: Sequence[CurvePoint], evaluator: Evaluator, out: Path) -> str:
    rows = [HEADINGS, *table_rows(points)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(f"{evaluator.features.name}; reference: {evaluator.reference.description}")
    if evaluator.floor is not None:
        lines.append(f"real images against the reference: {evaluator.floor:.3f}")
    if evaluator.skips:
        lines.append(evaluator.skips.summary("reference image"))
    return "\n".join([*lines, f"curve.csv, curve.json, curve.png, latency.png, curve.html: {out}"])
