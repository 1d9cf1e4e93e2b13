"""``flexidit curve``: quality against FLOPs and time at several budgets and guidance scales; resumable."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexidit import flops
from flexidit.commands.curve_conditions import Asked, add_prompt_arguments, embed, judges_of, read_texts
from flexidit.commands.curve_report import table_headings, table_rows, write_report
from flexidit.commands.curve_tasks import Task, add_task_arguments, read_tasks, unreached_notes
from flexidit.commands.evaluator import FEATURES, Evaluator, make_evaluator, sample_shape_of
from flexidit.commands.sampling_setup import (
    Codec,
    LoadedModel,
    add_model_arguments,
    add_solver_arguments,
    even_batches,
    load_model,
    need_codec,
    pick_codec,
    progress_bar,
    warm_up,
    warn_of_other_codec,
)
from flexidit.files import write_atomically
from flexidit.metrics.curve import (
    Evaluation,
    SamplingSettings,
    cost_per_image,
)
from flexidit.metrics.curve_candidates import base_patch_size
from flexidit.metrics.curve_points import CurvePoint, read_csv, write_csv
from flexidit.metrics.curve_samples import solver_name
from flexidit.metrics.features import FeatureExtractor
from flexidit.sampling.schedule import PatchSchedule

HELP = "quality against FLOPs and against time at several budgets: csv, json, png, html; an interrupted run continues"
EXAMPLE = """flexidit curve student.safetensors --budgets 1.0,0.8,0.6,0.46 --cfg-scale 1.5 \\
      --reference imagenet/train --vae sd-vae-ft-ema --out curve
  flexidit curve adapters.ckpt --budgets 1.0,0.6 --cfg-scale 1.5,3,4.5,6 --reference coco/val2014 \\
      --captions captions_val2014.json --text-encoder t5-v1_1-xxl --clip clip-vit-large-patch14 \\
      --vae sd-vae-ft-ema --out sweep"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_arguments(parser)
    add_task_arguments(parser)
    parser.add_argument("--num-samples", type=int, default=10_000, metavar="N", help="a point (default: %(default)s)")
    add_solver_arguments(parser)
    parser.add_argument("--guidance-channels", type=int, metavar="N", help="guide the first N (official DiT: 3)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--reference", required=True, help=".npz of statistics (mu, sigma), a folder of images or clips, or 'digits'"
    )
    parser.add_argument("--reference-fps", type=float, metavar="X", help="of clips in a folder (default: all frames)")
    parser.add_argument(
        "--features", metavar="NAME", help=f"{', '.join(FEATURES)} (default: inception; digits: digits)"
    )
    parser.add_argument("--feature-weights", type=Path, metavar="FILE", help="of the feature network")
    add_prompt_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, and to continue in")
    parser.add_argument("--json", action="store_true", help="print what curve.json holds")


@dataclass(frozen=True)
class Plan:
    """All that is known before the first sample."""

    tasks: list[Task]
    evaluation: Evaluation
    header: dict[str, Any]
    """What ``curve.json`` holds beside the points."""
    loaded: LoadedModel
    evaluator: Evaluator


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, then draw everything.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used.
    """
    plan = _plan(args)
    points = _resume(args.out, plan.header["settings"])
    args.out.mkdir(parents=True, exist_ok=True)
    _save(args.out, plan.header, points)
    todo = _missing(plan.tasks, points)
    _warm_up(plan, todo)
    for point in _measure(plan.evaluation, todo, points, show=not args.json):
        points.append(point)
        _save(args.out, plan.header, points)
    files = ["curve.csv", "curve.json", *write_report(args.out, plan.header, points)]
    if args.json:
        print(json.dumps(_payload(plan.header, points), indent=2))
    else:
        print(_describe(plan, points), f"{', '.join(files)}: {args.out}", sep="\n")
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    """Everything read and checked: what cannot run is refused here, not after hours."""
    loaded = load_model(args)
    tasks, settings = read_tasks(args, loaded), _sampling_settings(args, loaded)
    for task in tasks:  # refuses an impossible solver or guidance
        cost_per_image(loaded.model, task.candidate.schedule, task.settings(settings))
    texts = read_texts(args, loaded.model)
    codec = need_codec(pick_codec(loaded.model, args.vae, loaded.device), loaded.model)
    warn_of_other_codec(loaded, codec)
    shape = sample_shape_of(loaded.model, codec)
    evaluator = _evaluator(args, shape, loaded)
    judges = judges_of(args, evaluator, texts, is_video=len(shape) == 4)
    asked = None if texts is None else embed(args, loaded, texts)
    evaluation = Evaluation(
        model=loaded.model,
        codec=codec,
        features=evaluator.features,
        reference=evaluator.reference,
        settings=settings,
        full_steps=args.steps,
        classifier=evaluator.classifier if asked is None else None,
        model_name=loaded.name,
        conditions=None if asked is None else asked.prompts,
        judges=judges,
        frame_features=evaluator.frame_features,
        frame_reference=evaluator.frame_reference,
    )
    record = _record(args, loaded, codec, evaluation, asked)
    notes = unreached_notes(args, loaded) + ([] if asked is None else _notes(evaluation, asked))
    return Plan(tasks, evaluation, {"settings": record, "floor": evaluator.floor, "notes": notes}, loaded, evaluator)


def _evaluator(args: argparse.Namespace, shape: tuple[int, ...], loaded: LoadedModel) -> Evaluator:
    known = (args.features, args.feature_weights, args.reference, shape, loaded.device, args.num_samples)
    if len(shape) == 4:
        from flexidit.commands.clip_evaluator import make_clip_evaluator

        return make_clip_evaluator(*known, fps=args.reference_fps)
    if args.reference_fps is not None:
        raise ValueError("--reference-fps is for models of clips, and this one makes images; leave it out")
    return make_evaluator(*known)


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
        time_shift=args.time_shift,
        guidance_channels=args.guidance_channels,
        merged=loaded.merged,
        autocast=loaded.autocast,
    )


def _record(
    args: argparse.Namespace, loaded: LoadedModel, codec: Codec, evaluation: Evaluation, asked: Asked | None
) -> dict[str, Any]:
    """What all points of one curve share; a run continues only where all of it is the same."""
    is_video, frames = len(loaded.model.input_size) == 3, evaluation.frame_reference
    return {
        "model": loaded.name,
        "num_samples": args.num_samples,
        "steps": args.steps,
        "solver": solver_name(loaded.model, evaluation.settings),
        "guidance_channels": args.guidance_channels,
        "weak": args.weak,
        "reference": evaluation.reference.description,
        "evaluator": evaluation.features.name,
        "fingerprint": evaluation.features.fingerprint,
        **({"frame_reference": frames and frames.description} if is_video else {}),
        "codec": codec.fingerprint,
        "device": loaded.device_name,
        "precision": loaded.precision,
        "batch_size": args.batch_size,
        "merged": loaded.merged,
        "compiled": loaded.is_compiled,
        "prompts": None if asked is None else asked.prompts.description,
        "text_encoder": None if asked is None else asked.encoder,
        "judges": [judge.description for judge in evaluation.judges] if asked is not None or is_video else None,
    }


def _notes(evaluation: Evaluation, asked: Asked) -> list[str]:
    """What a reader of a curve of captions must know about its numbers."""
    model, merged = evaluation.model, evaluation.settings.merged
    full = PatchSchedule.constant(base_patch_size(model), evaluation.full_steps)
    costs = [flops.schedule_cost(model, full, merged=merged, captions=work).total for work in ("every_step", "once")]
    text = (
        "FLOPs count the work on captions (projection, keys and values of cross-attention) at every step, as the paper "
        "does; neither text encoder nor decoder. The sampler does that work once for a run, which the seconds show: "
        f"counted so, the full budget is {1 - costs[1] / costs[0]:.1%} cheaper."
    )
    return [text, *filter(None, [asked.note])]


def _resume(out: Path, record: Mapping[str, Any]) -> list[CurvePoint]:
    """Points that an interrupted run left.

    Raises:
        ValueError: they were measured under other settings, or something else lies there.
    """
    file = out / "curve.json"
    if not file.is_file():
        return []
    try:
        old = dict(json.loads(file.read_text())["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not a curve of this command; move it away, or give another --out") from None
    old.pop("cfg_scale", None)  # a property of each point, which earlier versions had here
    for name in {**record, **old}:
        if old.get(name) != record.get(name):
            raise ValueError(
                f"{out} holds a curve with {name}={old.get(name)} and this run has {name}={record.get(name)}, so that "
                "its points would not compare; give another --out"
            )
    return read_csv(out / "curve.csv")


def _missing(tasks: Sequence[Task], points: Sequence[CurvePoint]) -> list[Task]:
    present = {(point.series, point.budget, *_key(point)) for point in points}
    return [task for task in tasks if (task.candidate.series, task.candidate.budget, *task.key) not in present]


def _key(point: CurvePoint) -> tuple[str, float, int]:
    """That of the task that it is the result of."""
    return point.schedule, point.cfg_scale, point.seed


def _warm_up(plan: Plan, todo: Sequence[Task]) -> None:
    """Guided and unguided steps are batches of different sizes."""
    settings = plan.evaluation.settings
    prompts = plan.evaluation.conditions
    batch_size = even_batches(settings.num_samples, settings.batch_size)
    for is_guided in {task.cfg_scale != 1 for task in todo}:
        tasks = [task for task in todo if (task.cfg_scale != 1) == is_guided]
        steps = [step for task in tasks for step in task.candidate.schedule]
        options: dict[str, Any] = {"cfg_scale": tasks[0].cfg_scale, "guidance_channels": settings.guidance_channels}
        if prompts is not None:
            options |= {"y": prompts.told(torch.arange(1)), "negative": prompts.negative}
        warm_up(plan.loaded, steps, batch_size, **options)


def _measure(
    evaluation: Evaluation, todo: Sequence[Task], done: Sequence[CurvePoint], show: bool
) -> Iterator[CurvePoint]:
    """The missing points, each as soon as it is known; what is sampled alike is sampled once for all its series."""
    known = {_key(point): point for point in done}
    total = sum(_cost(evaluation, task) for task in {task.key: task for task in todo if task.key not in known}.values())
    with progress_bar("measuring", total, enabled=show) as advance:
        for task in todo:
            series, budget = task.candidate.series, task.candidate.budget
            if task.key not in known:
                known[task.key] = _measure_one(evaluation, task, advance)
            yield replace(known[task.key], series=series, budget=budget)


def _measure_one(evaluation: Evaluation, task: Task, advance: Callable[[float], None]) -> CurvePoint:
    cost, num_samples = _cost(evaluation, task), evaluation.settings.num_samples
    features = CountedFeatures(evaluation.features, lambda count: advance(cost * count / num_samples))
    return replace(evaluation, settings=task.settings(evaluation.settings), features=features).measure(task.candidate)


def _cost(evaluation: Evaluation, task: Task) -> float:
    """FLOPs of all samples of a point."""
    settings = task.settings(evaluation.settings)
    return cost_per_image(evaluation.model, task.candidate.schedule, settings) * settings.num_samples


class CountedFeatures:
    """A feature extractor that reports how many samples have passed: the progress inside a point of hours."""

    def __init__(self, features: FeatureExtractor, on_samples: Callable[[int], None]) -> None:
        self.features, self.on_samples = features, on_samples
        self.name, self.fingerprint = features.name, features.fingerprint

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, ...) -> (N, D)."""
        result = self.features(pixels)
        self.on_samples(len(pixels))
        return result


def _payload(header: Mapping[str, Any], points: Sequence[CurvePoint]) -> dict[str, Any]:
    return {**header, "points": [asdict(point) for point in points]}


def _save(out: Path, header: Mapping[str, Any], points: Sequence[CurvePoint]) -> None:
    """The points so far; a later run continues from the csv, if the settings in the json are its own."""
    write_csv(points, out / "curve.csv")
    write_atomically(out / "curve.json", (json.dumps(_payload(header, points), indent=2) + "\n").encode())


def _describe(plan: Plan, points: Sequence[CurvePoint]) -> str:
    evaluator = plan.evaluator
    rows = [table_headings(points), *table_rows(points)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(f"{evaluator.features.name}; reference: {evaluator.reference.description}")
    if evaluator.floor is not None:
        lines.append(f"real {points[0].sample}s against the reference: {evaluator.floor:.3f}")
    if evaluator.skips:
        lines.append(evaluator.skips.summary(f"reference {points[0].sample}"))
    asked = [part for part in (points[0].conditions, points[0].judges) if part]
    return "\n".join([*lines, *(["; ".join(asked)] if asked else []), *plan.header["notes"]])
