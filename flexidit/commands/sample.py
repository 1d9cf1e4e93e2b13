"""``flexidit sample``: pictures from a checkpoint under a schedule or at several budgets, and what they cost.

Shape legend: N samples, C channels, H W height and width, Z latent channels, h w latent height and width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexidit import __version__, flops
from flexidit.commands.sample_conditions import Asked, Told, add_condition_arguments, read_asked, tell
from flexidit.commands.sampling_setup import (
    Codec,
    LoadedModel,
    add_model_arguments,
    add_solver_arguments,
    even_batches,
    load_model,
    need_codec,
    now,
    parse_numbers,
    pick_codec,
    progress_bar,
    step_flops,
    warm_up,
    warn_of_other_codec,
)
from flexidit.files import write_atomically
from flexidit.metrics.curve import candidates
from flexidit.patch_size import PatchSize
from flexidit.pictures import GridRow, draw_grid, to_image
from flexidit.sampling.sampler import Sampler
from flexidit.sampling.schedule import PatchSchedule

HELP = "pictures from a checkpoint under a schedule, or at one or more budgets, with what they cost"
EXAMPLE = """flexidit sample student.safetensors --classes 207,360 --budget 1.0,0.6 --vae sd-vae-ft-ema --out pictures
  flexidit sample last.ckpt --base pixart --prompts "a red fox in snow;a harbour at dawn" --text-encoder pixart \\
    --vae pixart/vae --merge --solver dpm++ --steps 20 --cfg-scale 4.5 --budget 1.0,0.6 --out pictures"""

MAX_BATCH = 32
"""Samples in one forward pass if nobody says otherwise."""


@dataclass(frozen=True)
class Plan:
    """One schedule to sample under."""

    schedule: PatchSchedule
    prefix: str = ""
    """What the names of its files begin with; empty for a single schedule."""
    budget: float | None = None
    """Relative FLOPs that were asked for; None where the schedule was."""


@dataclass(frozen=True)
class Result:
    """What came out under one schedule: one entry of ``samples.json``."""

    budget: float | None
    schedule: str
    num_steps: int
    relative_flops: float
    """FLOPs of what ran, relative to the base patch size at each of these steps; captions counted at every step, as the
    paper does."""
    gflops_per_image: float
    captions_once: dict[str, float] | None
    """Both numbers with captions counted once, as they ran; None for models of classes."""
    seconds_per_image: float
    """Sampling without decoding; depends on batch size and device."""
    images_per_second: float
    decoding_seconds_per_image: float | None
    files: list[str]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_arguments(parser)
    add_condition_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--schedule", metavar="STAGES", help="patch size:steps in sampling order, such as 4:180,2:70")
    which.add_argument("--budget", metavar="LIST", help="relative FLOPs, such as 0.6 or 1.0,0.6,0.46 (default: 1.0)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 250, or the schedule's)")
    parser.add_argument("--weak", metavar="SIZE", help="patch size of a budget's cheap steps (default: the largest)")
    parser.add_argument(
        "--guide-powerful-steps",
        type=int,
        metavar="N",
        help="last steps whose guiding prediction is powerful (default: those of the conditional one)",
    )
    add_solver_arguments(parser)
    parser.add_argument("--cfg-scale", type=float, default=4.0, metavar="X", help="1: none (default: %(default)s)")
    parser.add_argument("--weak-guidance-scale", type=float, metavar="X", help="default: coupled to --cfg-scale")
    parser.add_argument("--guidance-channels", type=int, metavar="N", help="guide the first N (official DiT: 3)")
    parser.add_argument("--seed", type=int, default=0, help="the same noise for every budget (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"images at once (default: up to {MAX_BATCH})")
    parser.add_argument("--latents", action="store_true", help="also save the latents, as safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--json", action="store_true", help="print what samples.json holds")


def run(args: argparse.Namespace) -> int:
    """Sample, write and report.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used.
    """
    loaded = load_model(args)
    asked = read_asked(args, loaded)
    batch_size = _batch_size(args, asked.num_samples)
    plans = _plans(args, loaded)
    samplers = [_sampler(args, loaded, plan.schedule) for plan in plans]  # refuses what cannot run before anything runs
    codec = pick_codec(loaded.model, args.vae, loaded.device)
    warn_of_other_codec(loaded, codec)
    if not args.latents:
        need_codec(codec, loaded.model, ", or --latents to save them as they are")
    told = tell(args, loaded, asked)
    args.out.mkdir(parents=True, exist_ok=True)
    report = _report(args, loaded, samplers[0], codec) | told.record
    results = _sample_all(args, loaded, asked, told, plans, samplers, codec, batch_size)
    report["runs"] = [asdict(result) for result in results]
    write_atomically(args.out / "samples.json", (json.dumps(report, indent=2) + "\n").encode())
    print(json.dumps(report, indent=2) if args.json else _describe(report, args.out))
    return 0


def _plans(args: argparse.Namespace, loaded: LoadedModel) -> list[Plan]:
    base, powerful_steps = loaded.model.base_patch_size, args.guide_powerful_steps
    if args.schedule is not None:
        schedule = PatchSchedule.parse(args.schedule)
        if args.steps not in (None, len(schedule)):
            raise ValueError(f"--schedule has {len(schedule)} steps and --steps says {args.steps}; leave --steps out")
        return [Plan(schedule if powerful_steps is None else _with_guide(schedule, powerful_steps, base))]
    budgets = parse_numbers("1.0" if args.budget is None else args.budget, float, "--budget")
    num_steps = 250 if args.steps is None else args.steps
    if num_steps < 1:
        raise ValueError(f"--steps {num_steps} must be at least 1")
    plans = []
    for candidate in candidates(loaded.model, budgets, num_steps, weak=args.weak, merged=loaded.merged):
        schedule = candidate.schedule
        if powerful_steps is not None and candidate.budget != 1.0:  # the full budget stands beside the others as it is
            schedule = _with_guide(schedule, powerful_steps, base)
        prefix = f"budget-{candidate.budget:g}_" if len(budgets) > 1 else ""
        plans.append(Plan(schedule, prefix, candidate.budget))
    return plans


def _with_guide(schedule: PatchSchedule, powerful_steps: int, base: PatchSize) -> PatchSchedule:
    """The schedule with a guiding branch that is powerful for so many last steps only (READING.md 12)."""
    weak = schedule[0].cond
    num_weak = sum(step.cond == weak for step in schedule)
    two_stages = PatchSchedule.from_stages([(weak, num_weak), (base, max(1, len(schedule) - num_weak))])
    if weak == base or schedule != two_stages:
        raise ValueError(
            "--guide-powerful-steps goes with schedules of one weak stage and one powerful stage; "
            "write the guiding branch of others after a slash, as in --schedule 4:160,2:90/4:200,2:50"
        )
    return PatchSchedule.weak_first(
        num_steps=len(schedule),
        weak_steps=num_weak,
        guide_powerful_steps=powerful_steps,
        weak=weak,
        powerful=base,
    )


def _sampler(args: argparse.Namespace, loaded: LoadedModel, schedule: PatchSchedule) -> Sampler:
    how = {"autocast": loaded.autocast, "time_shift": args.time_shift, **_guidance(args)}
    return Sampler(loaded.model, args.solver, schedule=schedule, **how)


def _guidance(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "cfg_scale": args.cfg_scale,
        "weak_guidance_scale": args.weak_guidance_scale,
        "guidance_channels": args.guidance_channels,
    }


def _sample_all(
    args: argparse.Namespace,
    loaded: LoadedModel,
    asked: Asked,
    told: Told,
    plans: Sequence[Plan],
    samplers: Sequence[Sampler],
    codec: Codec | None,
    batch_size: int,
) -> list[Result]:
    """Sample under one plan after the other; pictures are written as soon as they are there, the grid at the end."""
    steps = [step for plan in plans for step in plan.schedule]
    warm_up(loaded, steps, batch_size, told.y, told.negative, **_guidance(args))
    costs = flops.forward_costs(loaded.model, merged=loaded.merged, captions="once")
    per_step = [[step_flops(step, costs, s.is_guided) for step in s.schedule] for s in samplers]
    total = sum(map(sum, per_step)) * -(-asked.num_samples // batch_size)
    results, rows = [], []
    with progress_bar("sampling", total, enabled=not args.json) as advance:
        for plan, sampler, step_costs in zip(plans, samplers, per_step, strict=True):
            began = now(loaded.device)
            latents = _draw(sampler, told, args.seed, batch_size, step_costs, advance)
            seconds = now(loaded.device) - began
            pixels, decoding = _decoded(codec, latents, loaded.device)
            files = _write(args, plan, asked, latents, pixels)
            costs_ran = _costs_per_image(loaded, sampler, asked.num_samples, batch_size)
            results.append(_result(plan, costs_ran, asked, seconds, decoding, files))
            rows.append(pixels)
    if codec is not None:
        _write_grid(args.out / "grid.png", [pixels for pixels in rows if pixels is not None], asked, results)
    return results


def _batch_size(args: argparse.Namespace, num_samples: int) -> int:
    if args.batch_size is None:
        return even_batches(num_samples, MAX_BATCH)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    return min(args.batch_size, num_samples)


def _draw(
    sampler: Sampler,
    told: Told,
    seed: int,
    batch_size: int,
    step_costs: Sequence[int],
    advance: Callable[[float], None],
) -> Tensor:
    """(N, Z, h, w) of finite values."""
    latents = sampler(
        told.y,
        negative=told.negative,
        generator=torch.Generator().manual_seed(seed),
        batch_size=batch_size,
        on_step=lambda step, x: advance(step_costs[step]),
    )
    if not latents.isfinite().all():
        raise ValueError("the samples hold NaN or infinity; try --dtype float32, or look at the weights")
    return latents


def _decoded(codec: Codec | None, latents: Tensor, device: torch.device) -> tuple[Tensor | None, float | None]:
    """Pixels (N, C, H, W) on the CPU, and the seconds it took."""
    if codec is None:
        return None, None
    began = now(device)
    pixels = codec.decode(latents).cpu()
    return pixels, now(device) - began


def _write(args: argparse.Namespace, plan: Plan, asked: Asked, latents: Tensor, pixels: Tensor | None) -> list[str]:
    """Write the samples of one plan; returns the names of the files."""
    files = []
    if args.latents:
        from safetensors.torch import save

        files.append(f"{plan.prefix}latents.safetensors")
        tensors = {"latents": latents.cpu().contiguous(), "prompts" if asked.is_text else "classes": asked.indices()}
        write_atomically(args.out / files[-1], save(tensors))
    if pixels is not None:
        for stem, image in zip(asked.stems(), pixels, strict=True):
            files.append(f"{plan.prefix}{stem}.png")
            write_atomically(args.out / files[-1], _png(to_image(image)))
    return files


def _png(image: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _costs_per_image(
    loaded: LoadedModel, sampler: Sampler, num_samples: int, batch_size: int
) -> dict[flops.CaptionWork, flops.ScheduleCost]:
    """What ran, divided by the images that ran, those that filled up the last batch included; in each way to count."""
    num_ran = -(-num_samples // batch_size) * batch_size
    ways: tuple[flops.CaptionWork, ...] = ("every_step", "once")
    return {
        way: _share(flops.trace_cost(loaded.model, sampler.trace, None, loaded.merged, way), num_ran) for way in ways
    }


def _share(cost: flops.ScheduleCost, count: int) -> flops.ScheduleCost:
    by_size = {size: total // count for size, total in cost.by_size.items()}
    return flops.ScheduleCost(by_size, cost.powerful_total // count, cost.captions // count)


def _result(
    plan: Plan,
    costs: dict[flops.CaptionWork, flops.ScheduleCost],
    asked: Asked,
    seconds: float,
    decoding: float | None,
    files: list[str],
) -> Result:
    num_samples = asked.num_samples
    return Result(
        budget=plan.budget,
        schedule=str(plan.schedule),
        num_steps=len(plan.schedule),
        **_cost_entries(costs["every_step"]),
        captions_once=_cost_entries(costs["once"]) if asked.is_text else None,
        seconds_per_image=seconds / num_samples,
        images_per_second=num_samples / seconds,
        decoding_seconds_per_image=None if decoding is None else decoding / num_samples,
        files=files,
    )


def _cost_entries(cost: flops.ScheduleCost) -> dict[str, float]:
    return {"relative_flops": round(cost.relative, 4), "gflops_per_image": round(cost.total / 1e9, 3)}


def _write_grid(path: Path, pictures: Sequence[Tensor], asked: Asked, results: Sequence[Result]) -> None:
    """A row for each class or prompt; of several budgets one for each, or, as prompts are long, a column."""
    title = "the same noise at each budget"
    if len(results) == 1:
        images = pictures[0].chunk(len(asked.names))
        rows = [GridRow(row, *label) for row, label in zip(images, asked.labels(), strict=True)]
        picture = draw_grid(rows, _headline(results[0]))
    elif asked.is_text:
        labels = [label for label in asked.labels() for _ in range(asked.num_each)]
        beside = torch.stack(list(pictures), dim=1)  # (N, budgets, C, H, W)
        rows = [GridRow(row, *label) for row, label in zip(beside, labels, strict=True)]
        picture = draw_grid(rows, title, [f"{result.relative_flops:.0%}" for result in results])
    else:
        names = [f"{result.relative_flops:.1%} FLOPs" for result in results]
        notes = [f"{result.seconds_per_image:.3g} s an image" for result in results]
        rows = [GridRow(*row) for row in zip(pictures, names, notes, strict=True)]
        picture = draw_grid(rows, title, [f"class {label}" for label in asked.indices().tolist()])
    write_atomically(path, _png(picture))


def _headline(result: Result) -> str:
    return f"{result.relative_flops:.1%} of the FLOPs, {result.seconds_per_image:.3g} s an image"


def _report(args: argparse.Namespace, loaded: LoadedModel, sampler: Sampler, codec: Codec | None) -> dict[str, Any]:
    """Everything needed to draw the same samples again."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {
        "arguments": arguments,
        "model": loaded.name,
        "merged": loaded.merged,
        "codec": None if codec is None else codec.fingerprint,
        "solver": sampler.solver_name,
        "cfg_scale": sampler.cfg_scale,
        "weak_guidance_scale": sampler.weak_guidance_scale,
        "device": loaded.device_name,
        "precision": loaded.precision,
        "versions": {"flexidit": __version__, "torch": str(torch.__version__)},
    }


def _describe(report: dict[str, Any], out: Path) -> str:
    """What a person wants to know, one line a schedule."""
    lines = [f"{report['model']} on {report['device']}, {report['precision']}"]
    for entry in report["runs"]:
        once = entry["captions_once"]
        as_ran = "" if once is None else f" ({once['gflops_per_image']:,.2f} as it ran, captions computed once)"
        lines.append(
            f"{entry['relative_flops']:.1%} of the FLOPs: {entry['gflops_per_image']:,.2f} GFLOPs{as_ran} and "
            f"{entry['seconds_per_image']:.3g} s an image, {entry['images_per_second']:.3g} images/s; "
            f"{entry['schedule']}"
        )
    num_files = sum(len(entry["files"]) for entry in report["runs"])
    grid = "" if report["codec"] is None else "grid.png, "
    return "\n".join([*lines, f"{num_files} files, {grid}samples.json: {out}"])
