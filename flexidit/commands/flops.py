"""``flexidit flops``: what a model's forward pass and a sampling schedule cost, without building the model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flexidit.commands.sizes import parse_size
from flexidit.config import CaptionedConfig, FlexConfig, TransformerConfig
from flexidit.flops import CaptionWork, caption_flops, forward_flops, schedule_cost, schedule_for_budget
from flexidit.patch_size import PatchSize
from flexidit.sampling.schedule import PatchSchedule
from flexidit.variants import variant_config

HELP = "what a model, a patch size or a schedule costs, in FLOPs (2 per multiply-accumulate, denoising network only)"
EXAMPLE = (
    "flexidit flops --model DiT-XL/2 --weak 4 --steps 250 --powerful-steps 70\n"
    "  flexidit flops --model PixArt-XL/2-256 --weak 4 --steps 100 --powerful-steps 60 --captions once\n"
    "  flexidit flops --model VideoDiT-4.9B --weak 1x4x4,2x2x2 --steps 50 --powerful-steps 20"
)
_WAYS: dict[str, CaptionWork] = {"every-step": "every_step", "once": "once"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", default="DiT-XL/2", metavar="NAME", help="variant (default: %(default)s)")
    parser.add_argument(
        "--weak", default="4", metavar="LIST", help="weak patch sizes, a schedule each: 4, 1x4x4,2x2x2 (default: 4)"
    )
    parser.add_argument(
        "--size",
        "--input-size",
        dest="input_size",
        metavar="SIZE",
        help="latent size: 32 or 32x64; of clips FxHxW, 32x48x88 (default: the variant's own)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="number of denoising steps (default: 250)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--powerful-steps", type=int, metavar="N", help="last steps that are powerful (default: all)")
    which.add_argument("--budget", type=float, metavar="X", help="find the schedule of this relative cost, such as 0.6")
    which.add_argument("--schedule", metavar="STAGES", help="stages in sampling order: 1x4x4:180,2x2x2:20,2:50")
    parser.add_argument(
        "--guide-powerful-steps",
        type=int,
        metavar="N",
        help="last steps whose guiding prediction is powerful (default: as --powerful-steps)",
    )
    parser.add_argument("--unguided", action="store_true", help="no guiding predictions (guidance scale 1)")
    parser.add_argument("--recipe", choices=("shared", "lora"), default="shared", help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=32, metavar="R", help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--unmerged", action="store_true", help="adapters run beside the weights (recipe lora)")
    parser.add_argument(
        "--captions",
        choices=tuple(_WAYS),
        default="every-step",
        help="count projection, keys and values of captions at every step, as the paper does, or once for a sample, as "
        "the sampler computes them (default: %(default)s)",
    )
    parser.add_argument("--caption-tokens", type=int, metavar="N", help="of a caption (default: the variant's most)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Price what was asked for and print it."""
    report = _report(args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print_tables(report)
    return 0


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed; numbers are rounded to what is significant."""
    config, weak, terms = _config(args), _weak_sizes(args), _terms(args)
    schedules = [_schedule(args, config, one) for one in (weak if args.schedule is None else weak[:1])]
    used = {size for schedule in schedules for size in schedule.sizes}
    entries = [_schedule_entry(args, config, schedule) for schedule in schedules]
    return {
        "model": args.model,
        "input_size": list(config.input_size),
        "powerful_gflops": round(forward_flops(config, config.patch_size, **terms) / 1e9, 2),
        **(_weak_entry(config, weak[0], terms) if len(weak) == 1 else {}),
        "forward": [_forward_row(config, size, terms) for size in sorted({config.patch_size, *weak, *used})],
        **_caption_entries(config, args.captions),
        **(entries[0] if len(entries) == 1 else {"schedules": entries}),
    }


def _weak_entry(config: TransformerConfig, weak: PatchSize, terms: dict[str, Any]) -> dict[str, Any]:
    weak_flops, powerful_flops = (forward_flops(config, size, **terms) for size in (weak, config.patch_size))
    return {"weak_gflops": round(weak_flops / 1e9, 2), "weak_relative": round(weak_flops / powerful_flops, 4)}


def _schedule_entry(args: argparse.Namespace, config: TransformerConfig, schedule: PatchSchedule) -> dict[str, Any]:
    cost = schedule_cost(config, schedule, guided=not args.unguided, **_terms(args))
    return {
        "schedule": str(schedule),
        "steps": len(schedule),
        "guided": not args.unguided,
        "total_tflops": round(cost.total / 1e12, 3),
        "powerful_total_tflops": round(cost.powerful_total / 1e12, 3),
        "relative": round(cost.relative, 3),
    }


def _weak_sizes(args: argparse.Namespace) -> list[PatchSize]:
    sizes = [PatchSize.parse(text) for text in args.weak.split(",")]
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"--weak {args.weak} names a patch size twice")
    return sizes


def _terms(args: argparse.Namespace) -> dict[str, Any]:
    """What all prices have in common."""
    return {"merged": not args.unmerged, "captions": _WAYS[args.captions]}


def _caption_entries(config: TransformerConfig, way: str) -> dict[str, Any]:
    """Where captions are counted; nothing for models of labels."""
    if not isinstance(config, CaptionedConfig):
        return {}
    gflops = round(caption_flops(config) / 1e9, 2)
    return {"captions": _WAYS[way], "caption_tokens": config.caption_length, "caption_gflops": gflops}


def _forward_row(config: TransformerConfig, size: PatchSize, terms: dict[str, Any]) -> dict[str, Any]:
    flops = forward_flops(config, size, **terms)
    base = forward_flops(config, config.patch_size, **terms)
    return {
        "patch_size": size.name,
        "tokens": size.num_tokens(config.input_size),
        "gflops": round(flops / 1e9, 2),
        "gmacs": round(flops / 2e9, 2),
        "relative": round(flops / base, 4),
    }


def _config(args: argparse.Namespace) -> TransformerConfig:
    config: TransformerConfig = _with_captions(args, variant_config(args.model))
    if args.input_size is not None:
        config = replace(config, input_size=parse_size(args.input_size, len(config.input_size)))
    if args.recipe == "shared":
        if args.unmerged:
            raise ValueError("--unmerged prices adapters, which the shared recipe has none of; add --recipe lora")
        return config
    if args.rank < 1:
        raise ValueError(f"--rank {args.rank} must be at least 1")
    return replace(config, flex=FlexConfig("lora", tuple(sorted(_weak_sizes(args))), rank=args.rank))


def _with_captions(args: argparse.Namespace, config: TransformerConfig) -> TransformerConfig:
    """Captions as long as they were said to be."""
    if not isinstance(config, CaptionedConfig):
        if args.captions != "every-step" or args.caption_tokens is not None:
            raise ValueError(f"{args.model} takes labels; --captions and --caption-tokens are for models of text")
        return config
    if args.caption_tokens is None:
        return config
    if args.caption_tokens < 1:
        raise ValueError(f"--caption-tokens {args.caption_tokens} must be at least 1")
    return replace(config, caption_length=args.caption_tokens)


def _schedule(args: argparse.Namespace, config: TransformerConfig, weak: PatchSize) -> PatchSchedule:
    if args.guide_powerful_steps is not None and args.powerful_steps is None:
        raise ValueError("--guide-powerful-steps needs --powerful-steps")
    num_steps = 250 if args.steps is None else args.steps
    if args.schedule is not None:
        schedule = PatchSchedule.parse(args.schedule)
        if args.steps not in (None, len(schedule)):
            raise ValueError(f"--schedule has {len(schedule)} steps and --steps says {args.steps}; leave --steps out")
        return schedule
    if args.budget is not None:
        return schedule_for_budget(config, args.budget, num_steps, weak=weak, **_terms(args))
    return PatchSchedule.weak_first(
        num_steps=num_steps,
        powerful_steps=num_steps if args.powerful_steps is None else args.powerful_steps,
        guide_powerful_steps=args.guide_powerful_steps,
        weak=weak,
        powerful=config.patch_size,
    )


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    size = "x".join(map(str, report["input_size"]))
    forward = Table(title=f"{report['model']}, latent {size}: one forward pass", title_justify="left")
    for heading in ("patch size", "tokens", "GFLOPs", "GMACs", "relative"):
        forward.add_column(heading, justify="right")
    for row in report["forward"]:
        forward.add_row(
            row["patch_size"],
            f"{row['tokens']:,}",
            f"{row['gflops']:,.2f}",
            f"{row['gmacs']:,.2f}",
            f"{100 * row['relative']:.2f} %",
        )
    console = Console()
    console.print(forward)
    if "captions" in report:
        console.print(_caption_sentence(report), highlight=False, soft_wrap=True)
    for entry in report.get("schedules", [report]):
        for sentence in _schedule_sentences(entry):
            console.print(sentence, highlight=False, soft_wrap=True)


def _schedule_sentences(entry: dict[str, Any]) -> Iterator[str]:
    guidance = "with guidance" if entry["guided"] else "without guidance"
    yield f"schedule {entry['schedule']} ({entry['steps']} steps, {guidance})"
    yield (
        f"{entry['total_tflops']:,.3f} TFLOPs per sample, {100 * entry['relative']:.1f} % of the "
        f"{entry['powerful_total_tflops']:,.3f} of powerful steps only"
    )


def _caption_sentence(report: dict[str, Any]) -> str:
    counted = {"every_step": "in every forward pass, as in the paper", "once": "once for each branch, as it is run"}
    captions = f"captions of {report['caption_tokens']} tokens ({report['caption_gflops']:.2f} GFLOPs)"
    return f"{captions} counted {counted[report['captions']]}"
