"""What ``flexidit sample`` runs: schedules, each with its budget, at which latent size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexidit.commands.sampling_setup import LoadedModel, parse_numbers
from flexidit.commands.sizes import parse_size
from flexidit.metrics.curve_candidates import candidates
from flexidit.patch_size import PatchSize
from flexidit.sampling.schedule import PatchSchedule


@dataclass(frozen=True)
class Plan:
    """One schedule to sample under."""

    schedule: PatchSchedule
    prefix: str = ""
    """What the names of its files begin with; empty for a single schedule."""
    budget: float | None = None
    """Relative FLOPs that were asked for; None where the schedule was."""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare schedules, budgets and sizes."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--schedule", metavar="STAGES", help="patch size:steps in sampling order: 4:180,2:70 or 1x4x4:12,2x2x2:6,2:6"
    )
    which.add_argument("--budget", metavar="LIST", help="relative FLOPs, such as 0.6 or 1.0,0.6,0.46 (default: 1.0)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 250, or the schedule's)")
    parser.add_argument("--weak", metavar="SIZE", help="patch size of a budget's cheap steps (default: the largest)")
    parser.add_argument(
        "--guide-powerful-steps",
        type=int,
        metavar="N",
        help="last steps whose guiding prediction is powerful (default: those of the conditional one)",
    )
    parser.add_argument(
        "--size", metavar="SIZE", help="latent size: 32 or 32x64; of clips FxHxW, 21x60x104 (default: the model's)"
    )
    parser.add_argument("--frames", type=int, metavar="N", help="latent frames of clips (default: the model's)")


def read_size(args: argparse.Namespace, model: Any) -> tuple[int, ...]:
    """Latent size of the samples.

    Raises:
        ValueError: it is none, or not of the kind that the model makes.
    """
    native = tuple(model.input_size)
    is_video = len(native) == 3
    if args.frames is not None and (not is_video or args.size is not None or args.frames < 1):
        raise ValueError(f"--frames {args.frames} is for models of clips, at least 1, and without --size FxHxW")
    if args.frames is not None:
        return (args.frames, *native[1:])
    return native if args.size is None else parse_size(args.size, len(native))


def read_plans(args: argparse.Namespace, loaded: LoadedModel, size: Sequence[int]) -> list[Plan]:
    """The schedule that was given, or one for each budget.

    Raises:
        ValueError: stages, budgets or steps that are none, or do not go together.
    """
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
    for candidate in candidates(loaded.model, budgets, num_steps, weak=args.weak, merged=loaded.merged, size=size):
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
