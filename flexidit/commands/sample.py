"""``flexidit sample``: pictures or clips from a checkpoint under a schedule or at several budgets, and what they cost.

Shape legend: N samples, n of them in one batch, Z latent channels, h w latent height and width (f h w of
clips).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexidit import __version__, flops
from flexidit.commands.sample_conditions import Asked, Told, add_condition_arguments, read_asked, tell
from flexidit.commands.sample_files import Cost, SampleFiles, add_file_arguments, make_files
from flexidit.commands.sample_plans import Plan, add_plan_arguments, read_plans, read_size
from flexidit.commands.sampling_setup import (
    Codec,
    LoadedModel,
    add_model_arguments,
    add_solver_arguments,
    even_batches,
    load_model,
    need_codec,
    now,
    pick_codec,
    progress_bar,
    step_flops,
    warm_up,
    warn_of_other_codec,
)
from flexidit.files import write_atomically
from flexidit.sampling.sampler import Call, Sampler
from flexidit.sampling.schedule import PatchSchedule

HELP = "pictures or clips from a checkpoint under a schedule, or at one or more budgets, with what they cost"
EXAMPLE = """flexidit sample student.safetensors --classes 207,360 --budget 1.0,0.6 --vae sd-vae-ft-ema --out pictures
  flexidit sample last.ckpt --base pixart --prompts "a red fox in snow;a harbour at dawn" --text-encoder pixart \\
    --vae pixart/vae --merge --solver dpm++ --steps 20 --cfg-scale 4.5 --budget 1.0,0.6 --out pictures
  flexidit sample last.ckpt --base wan --prompt-file prompts.txt --text-encoder wan --vae wan/vae --steps 50 \\
    --schedule 1x4x4:20,2x2x2:10,2:20 --frames 21 --layout vbench --fps 16 --out clips"""

MAX_IMAGES, MAX_CLIPS = 32, 4
"""Samples in one forward pass if nobody says otherwise."""


@dataclass(frozen=True)
class Setting:
    """What all schedules share."""

    loaded: LoadedModel
    asked: Asked
    told: Told
    size: tuple[int, ...]
    """Latent size."""
    codec: Codec | None
    batch_size: int
    seed: int

    @property
    def num_batches(self) -> int:
        """Of each schedule."""
        return -(-self.asked.num_samples // self.batch_size)


@dataclass(frozen=True)
class Result:
    """What came out under one schedule."""

    plan: Plan
    costs: dict[flops.CaptionWork, flops.ScheduleCost]
    """FLOPs of one sample as it ran, relative to the base patch size at each of these steps; in each way to count."""
    num_samples: int
    seconds: float
    """Sampling without decoding; depends on batch size and device."""
    decoding: float | None
    """Seconds; None where nothing was decoded."""
    files: list[str]

    def entry(self, sample: str, is_text: bool) -> dict[str, Any]:
        """The same as ``samples.json`` has it, for an "image" or a "clip".

        FLOPs count captions at every step, as the paper does; ``captions_once`` says both numbers as they ran.
        """
        return {
            "budget": self.plan.budget,
            "schedule": str(self.plan.schedule),
            "num_steps": len(self.plan.schedule),
            **_cost_entries(self.costs["every_step"], sample),
            "captions_once": _cost_entries(self.costs["once"], sample) if is_text else None,
            f"seconds_per_{sample}": self.seconds / self.num_samples,
            f"{sample}s_per_second": self.num_samples / self.seconds,
            f"decoding_seconds_per_{sample}": None if self.decoding is None else self.decoding / self.num_samples,
            "files": self.files,
        }

    def time(self, sample: str) -> str:
        """In a few words."""
        return f"{self.seconds / self.num_samples:.3g} s a{'n' * (sample == 'image')} {sample}"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_arguments(parser)
    add_condition_arguments(parser)
    add_plan_arguments(parser)
    add_solver_arguments(parser)
    parser.add_argument("--cfg-scale", type=float, default=4.0, metavar="X", help="1: none (default: %(default)s)")
    parser.add_argument("--weak-guidance-scale", type=float, metavar="X", help="default: coupled to --cfg-scale")
    parser.add_argument("--guidance-channels", type=int, metavar="N", help="guide the first N (official DiT: 3)")
    parser.add_argument("--seed", type=int, default=0, help="the same noise for every budget (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help=f"at once (default: up to {MAX_IMAGES} images, {MAX_CLIPS} clips)"
    )
    add_file_arguments(parser)
    parser.add_argument("--latents", action="store_true", help="also save the latents, as safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--json", action="store_true", help="print what samples.json holds")


def run(args: argparse.Namespace) -> int:
    """Sample, write and report.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used.
    """
    loaded = load_model(args)
    asked, size = read_asked(args, loaded), read_size(args, loaded.model)
    batch_size = _batch_size(args, asked.num_samples, MAX_CLIPS if len(size) == 3 else MAX_IMAGES)
    plans = read_plans(args, loaded, size)
    samplers = [_sampler(args, loaded, plan.schedule) for plan in plans]  # refuses what cannot run before anything runs
    codec = pick_codec(loaded.model, args.vae, loaded.device)
    warn_of_other_codec(loaded, codec)
    if not args.latents:
        need_codec(codec, loaded.model, ", or --latents to save them as they are")
    files = make_files(args, asked, size, codec)
    run_in = Setting(loaded, asked, tell(args, loaded, asked), size, codec, batch_size, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    warm_up(
        loaded,
        [step for plan in plans for step in plan.schedule],
        batch_size,
        run_in.told.y,
        run_in.told.negative,
        size,
        **_guidance(args),
    )
    results = _sample_all(run_in, plans, samplers, files, show=not args.json)
    report = _report(args, run_in, samplers[0]) | files.record
    report["runs"] = [result.entry(files.sample, asked.is_text) for result in results]
    write_atomically(args.out / "samples.json", (json.dumps(report, indent=2) + "\n").encode())
    print(json.dumps(report, indent=2) if args.json else _describe(report, files, args.out))
    return 0


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
    setting: Setting, plans: Sequence[Plan], samplers: Sequence[Sampler], files: SampleFiles, show: bool
) -> list[Result]:
    """One plan after the other, batch by batch; what is there is written at once, the overview at the end."""
    costs = flops.forward_costs(setting.loaded.model, setting.size, merged=setting.loaded.merged, captions="once")
    per_step = [[step_flops(step, costs, s.is_guided) for step in s.schedule] for s in samplers]
    results = []
    with progress_bar("sampling", sum(map(sum, per_step)) * setting.num_batches, enabled=show) as advance:
        for plan, sampler, step_costs in zip(plans, samplers, per_step, strict=True):
            results.append(_sample_plan(setting, plan, sampler, files, partial(_advance, advance, step_costs)))
    files.finish([Cost(result.costs["every_step"].relative, result.time(files.sample)) for result in results])
    return results


def _advance(advance: Callable[[float], None], step_costs: Sequence[int], step: int) -> None:
    advance(step_costs[step])


def _sample_plan(
    setting: Setting, plan: Plan, sampler: Sampler, files: SampleFiles, on_step: Callable[[int], None]
) -> Result:
    generator = torch.Generator().manual_seed(setting.seed)
    trace: list[Call] = []
    names, sampling, decoding = files.begin(plan), 0.0, None
    for rows in torch.arange(setting.asked.num_samples).split(setting.batch_size):
        began = now(setting.loaded.device)
        latents = _draw(setting, sampler, rows, generator, on_step)
        sampled = now(setting.loaded.device)
        pixels = None if setting.codec is None else setting.codec.decode(latents).cpu()
        if pixels is not None:
            decoding = (decoding or 0.0) + now(setting.loaded.device) - sampled
        sampling += sampled - began
        trace += sampler.trace
        names += files.write(plan, rows.tolist(), latents.cpu(), pixels)
    costs = _costs_per_sample(setting, trace)
    return Result(plan, costs, setting.asked.num_samples, sampling, decoding, names + files.end(plan))


def _draw(
    setting: Setting, sampler: Sampler, rows: Tensor, generator: torch.Generator, on_step: Callable[[int], None]
) -> Tensor:
    """(n, Z, [f,] h, w) of finite values."""
    latents = sampler(
        setting.told.y[setting.told.rows[rows]],
        negative=setting.told.negative,
        generator=generator,
        size=setting.size,
        batch_size=setting.batch_size,
        on_step=lambda step, x: on_step(step),
    )
    if not latents.isfinite().all():
        raise ValueError("the samples hold NaN or infinity; try --dtype float32, or look at the weights")
    return latents


def _batch_size(args: argparse.Namespace, num_samples: int, limit: int) -> int:
    if args.batch_size is None:
        return even_batches(num_samples, limit)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    return min(args.batch_size, num_samples)


def _costs_per_sample(setting: Setting, trace: Sequence[Call]) -> dict[flops.CaptionWork, flops.ScheduleCost]:
    """What ran, divided by the samples that ran, those that filled up the last batch included; in each way to count."""
    num_ran, loaded = setting.num_batches * setting.batch_size, setting.loaded
    ways: tuple[flops.CaptionWork, ...] = ("every_step", "once")
    return {
        way: _share(flops.trace_cost(loaded.model, trace, setting.size, loaded.merged, way), num_ran) for way in ways
    }


def _share(cost: flops.ScheduleCost, count: int) -> flops.ScheduleCost:
    by_size = {size: total // count for size, total in cost.by_size.items()}
    return flops.ScheduleCost(by_size, cost.powerful_total // count, cost.captions // count)


def _cost_entries(cost: flops.ScheduleCost, sample: str) -> dict[str, float]:
    return {"relative_flops": round(cost.relative, 4), f"gflops_per_{sample}": round(cost.total / 1e9, 3)}


def _report(args: argparse.Namespace, setting: Setting, sampler: Sampler) -> dict[str, Any]:
    """Everything needed to draw the same samples again."""
    loaded, codec = setting.loaded, setting.codec
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
        **({} if setting.size == tuple(loaded.model.input_size) else {"latent_size": list(setting.size)}),
        "versions": {"flexidit": __version__, "torch": str(torch.__version__)},
        **setting.told.record,
    }


def _describe(report: dict[str, Any], files: SampleFiles, out: Path) -> str:
    """What a person wants to know, one line a schedule."""
    lines = [f"{report['model']} on {report['device']}, {report['precision']}"]
    sample, article = files.sample, "an" if files.sample == "image" else "a"
    for entry in report["runs"]:
        once = entry["captions_once"]
        as_ran = "" if once is None else f" ({once[f'gflops_per_{sample}']:,.2f} as it ran, captions computed once)"
        lines.append(
            f"{entry['relative_flops']:.1%} of the FLOPs: {entry[f'gflops_per_{sample}']:,.2f} GFLOPs{as_ran} and "
            f"{entry[f'seconds_per_{sample}']:.3g} s {article} {sample}, {entry[f'{sample}s_per_second']:.3g} "
            f"{sample}s/s; {entry['schedule']}"
        )
    num_files = sum(len(entry["files"]) for entry in report["runs"])
    return "\n".join([*lines, f"{num_files} files, {', '.join([*files.extra, 'samples.json'])}: {out}", *files.hints])
