"""``flexidit convert --to wan-pipeline``: a flexible Wan that stock diffusers samples from, weak patches first."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexidit.commands.convert_report import compare, facts_of, make_report
from flexidit.sampling.schedule import PatchSchedule

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer

PIPELINE = "wan-pipeline"
_OPTIONS = ("pipeline", "schedule", "solver", "time_shift", "link")


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    group = parser.add_argument_group(f"--to {PIPELINE}")
    group.add_argument(
        "--pipeline",
        metavar="DIR",
        help="local folder of the stock pipeline: its VAE, text encoder, scheduler are taken",
    )
    group.add_argument("--schedule", metavar="SIZE:STEPS,SIZE:STEPS", help="two stages, such as 1x4x4:30,1x2x2:20")
    group.add_argument("--solver", metavar="NAME", help="unipc, euler or dpm++; default: the pipeline's scheduler")
    group.add_argument("--time-shift", type=float, metavar="X", help="of noise levels; default: the pipeline's")
    group.add_argument(
        "--link", action="store_true", help="symbolic links to the stock pipeline's parts, not copies (UMT5 has 11 GB)"
    )


def check_pipeline_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: in one sentence.
    """
    given = [name for name in _OPTIONS if getattr(args, name)]
    if args.to != PIPELINE:
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is for --to {PIPELINE}, not {args.to}; leave it out")
        return
    if args.pipeline is None or args.schedule is None:
        raise ValueError(f"--to {PIPELINE} needs --pipeline, the stock one, and --schedule, such as 1x4x4:30,1x2x2:20")
    if args.patch_size is not None:
        raise ValueError(f"the schedule says which patch sizes --to {PIPELINE} writes; leave --patch-size out")


def convert_pipeline(student: FlexiTransformer, args: argparse.Namespace) -> dict[str, Any]:
    """Write both transformers and everything around them, read the transformers back and compare.

    Raises:
        FileNotFoundError, ValueError: a model, a schedule or a stock pipeline that do not go together.
    """
    import torch

    from flexidit.pipelines import (
        StockPipeline,
        check_expressible,
        pipeline_scheduler,
        save_wan_pipeline,
        two_stages,
    )

    stock, schedule = StockPipeline.read(Path(args.pipeline).expanduser()), PatchSchedule.parse(args.schedule)
    first, second, _ = two_stages(schedule)
    config = check_expressible(student.config, tuple(map(student.check_patch_size, (first, second))))
    scheduler = pipeline_scheduler(stock, config, args.solver, args.time_shift)
    read = facts_of(student.config, dict(student.named_parameters()))
    if args.dtype is not None:
        student = student.to(getattr(torch, args.dtype))
    call = save_wan_pipeline(student, args.output, stock, schedule, scheduler=scheduler, link=args.link)
    compared = _read_back(student, args.output, {"transformer": first.name, "transformer_2": second.name})
    written = facts_of(config, dict(student.named_parameters()))
    result = make_report(args, read, written, "", compared)
    return {**result, "call": {**call, "transformer": first.name, "transformer_2": second.name}}


def _read_back(student: FlexiTransformer, folder: Path, sizes: dict[str, str]) -> int:
    """Number of tensors of both transformers, if all came back as they were."""
    from flexidit.checkpoint import load_checkpoint
    from flexidit.recipes import plain_copy

    counts = [
        compare(plain_copy(student, size).state_dict(), load_checkpoint(folder / name).state_dict(), folder / name)
        for name, size in sizes.items()
    ]
    return sum(counts)
