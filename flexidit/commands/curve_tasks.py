"""Which points ``flexidit curve`` measures: orders, weak patch sizes, mixtures, budgets, guidance scales and seeds."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from flexidit.commands.sampling_setup import LoadedModel, parse_numbers
from flexidit.metrics.curve import SamplingSettings
from flexidit.metrics.curve_candidates import Candidate, Series, mixture_candidates, mode_candidates, reaches
from flexidit.patch_size import PatchSize
from flexidit.sampling.schedule import PatchSchedule

ORDERS: dict[str, Series] = {
    "weak_first": "weak first",
    "weak_last": "weak last",
    "fewer_steps": "fewer steps",
}


@dataclass(frozen=True)
class Task:
    """One point to measure."""

    candidate: Candidate
    cfg_scale: float
    seed: int

    @property
    def key(self) -> tuple[str, float, int]:
        """What decides the samples: series that meet in one schedule share its point."""
        return str(self.candidate.schedule), self.cfg_scale, self.seed

    def settings(self, shared: SamplingSettings) -> SamplingSettings:
        """Its own, out of those that all points share."""
        return replace(shared, cfg_scale=self.cfg_scale, seed=self.seed)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which points a curve has."""
    parser.add_argument("--budgets", default="1.0,0.8,0.6,0.46", metavar="LIST", help="default: %(default)s")
    parser.add_argument("--order", default="weak_first", metavar="LIST", help=f"of {', '.join(ORDERS)}")
    parser.add_argument(
        "--weak",
        metavar="LIST",
        help="patch size of the cheap steps, or several, a line each: 1x4x4,2x2x2 (default: the largest)",
    )
    parser.add_argument(
        "--schedules",
        metavar="LIST",
        help="also these schedules, of any patch sizes, separated by semicolons: 1x4x4:12,2x2x2:6,1x2x2:6;...",
    )
    parser.add_argument("--seeds", default="0", metavar="LIST", help="a point each: 0,1,2 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=250, metavar="N", help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--cfg-scale",
        default="1.5",
        metavar="LIST",
        help="guidance; 1: none; a point each: 1,1.5,3 (default: %(default)s)",
    )


def read_tasks(args: argparse.Namespace, loaded: LoadedModel) -> list[Task]:
    """Every seed of every guidance scale of every schedule, one whole curve after the other.

    Raises:
        ValueError: an order that does not exist, lists that are none, budgets out of reach.
    """
    scales = parse_numbers(args.cfg_scale, float, "--cfg-scale")
    budgets = parse_numbers(args.budgets, float, "--budgets")
    seeds = parse_numbers(args.seeds, int, "--seeds")
    names = args.order.split(",")
    for name in names:
        if name not in ORDERS:
            raise ValueError(f"unknown order {name!r}; give one or more of {', '.join(ORDERS)}")
    weak = read_weak(args.weak)
    found = [
        candidate
        for name in names
        for candidate in mode_candidates(loaded.model, budgets, args.steps, ORDERS[name], weak, loaded.merged)
    ]
    found += mixture_candidates(loaded.model, _read_schedules(args.schedules), args.steps, loaded.merged)
    return [Task(candidate, scale, seed) for seed in seeds for scale in scales for candidate in found]


def read_weak(text: str | None) -> list[PatchSize]:
    """Patch sizes, separated by commas.

    Raises:
        ValueError: one is none, or named twice.
    """
    sizes = [PatchSize.parse(part) for part in text.split(",")] if text else []
    for size in sizes:
        if sizes.count(size) > 1:
            raise ValueError(f"--weak {text!r} has {size} twice")
    return sizes


def _read_schedules(text: str | None) -> list[PatchSchedule]:
    schedules = [PatchSchedule.parse(part) for part in (text or "").split(";") if part.strip()]
    for schedule in schedules:
        if schedules.count(schedule) > 1:
            raise ValueError(f"--schedules {text!r} has {schedule} twice")
    return schedules


def unreached_notes(args: argparse.Namespace, loaded: LoadedModel) -> list[str]:
    """Which budgets the lines of a curve lack, a sentence each."""
    sizes, budgets = read_weak(args.weak), parse_numbers(args.budgets, float, "--budgets")
    if len(sizes) < 2:
        return []
    model, merged = loaded.model, loaded.merged
    lacking = {size: [b for b in budgets if not reaches(model, size, b, args.steps, merged)] for size in sizes}
    return [
        f"Patch size {size} does not reach {', '.join(f'{budget:g}' for budget in missed)}."
        for size, missed in lacking.items()
        if missed
    ]
