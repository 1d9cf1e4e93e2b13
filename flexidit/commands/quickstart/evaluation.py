"""Measuring every schedule with several seeds; each result is on disk as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexidit.commands.quickstart.judge import Judge
from flexidit.commands.quickstart.recipe import Recipe
from flexidit.latents import PixelCodec
from flexidit.metrics.curve import Evaluation, SamplingSettings
from flexidit.metrics.curve_candidates import MIXTURE
from flexidit.metrics.curve_points import CurvePoint, read_csv, write_csv


def measure(model: Any, judge: Judge, recipe: Recipe[Any], file: Path) -> Iterator[list[CurvePoint]]:
    """All points so far, after each new one; points that ``file`` has already are not measured again."""
    done, points = read_csv(file), []
    for seed in range(recipe.settings.num_seeds):
        evaluation = _evaluation(model, judge, recipe, seed)
        for point in evaluation.curve(recipe.schedules(model), done):
            points.append(point)
            write_csv([*points, *(p for p in done if p not in points)], file)
            yield points


def _evaluation(model: Any, judge: Judge, recipe: Recipe[Any], seed: int) -> Evaluation:
    settings = recipe.settings
    return Evaluation(
        model=model,
        codec=PixelCodec(channels=1),
        features=judge.features,
        reference=judge.reference,
        frame_features=judge.frame_features,
        frame_reference=judge.frame_reference,
        settings=SamplingSettings(
            num_samples=settings.num_samples,
            batch_size=settings.sampling_batch_size,
            cfg_scale=settings.cfg_scale,
            seed=seed,
            merged=True,
        ),
        full_steps=settings.num_sampling_steps,
        conditions=recipe.conditions(seed),
        judges=recipe.judges(judge),
        model_name="quick start student",
    )


def with_shared_ends(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The points, and those that belong to several lines of the plot once per line.

    Full budget is where all ways to save begin; all-weak is where the order of the steps ceases to matter.
    """
    costs = [point.relative_flops for point in points]
    full = [point for point in points if point.relative_flops == max(costs)]
    weak = [point for point in points if point.relative_flops == min(costs)]
    known = {point.series for point in full}
    others = [name for name in dict.fromkeys(point.series for point in points) if name not in (*known, MIXTURE)]
    shared = [replace(point, series=name) for name in others for point in _once_a_seed(full)]
    return [*points, *shared, *(replace(point, series="weak last") for point in weak)]


def _once_a_seed(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Lines that meet share one measurement."""
    return list({point.seed: point for point in points}.values())
