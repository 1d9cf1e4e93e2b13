"""What the quick start shows: the table, the curve, the samples and the page that explains them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flexidit import report
from flexidit.commands.quickstart.evaluation import Judge, schedules, with_shared_ends
from flexidit.commands.quickstart.recipe import Recipe
from flexidit.commands.quickstart.settings import QuickstartSettings
from flexidit.metrics.curve_points import CurvePoint
from flexidit.pictures import GridRow, save_grid
from flexidit.plots import plot_curve
from flexidit.sampling.sampler import Sampler

HEADINGS = ("saved by", "FLOPs", "steps of patch", "ms", "Frechet", "range", "class")
CAPTION_HEADINGS = (*HEADINGS, "text")


@dataclass(frozen=True)
class Row:
    """One schedule, over all seeds."""

    series: str
    relative_flops: float
    schedule: str
    milliseconds: float
    frechet: float
    lowest: float
    highest: float
    accuracy: float
    agreement: float | None
    """Share of what captions say that the samples show; None without captions."""

    def cells(self) -> tuple[str, ...]:
        """As :data:`HEADINGS` name them, or :data:`CAPTION_HEADINGS`."""
        caption = () if self.agreement is None else (f"{self.agreement:.1%}",)
        return (
            self.series,
            f"{self.relative_flops:.0%}",
            _steps_in_short(self.schedule),
            f"{self.milliseconds:.1f}",
            f"{self.frechet:.2f}",
            f"{self.lowest:.2f}-{self.highest:.2f}",
            f"{self.accuracy:.1%}",
            *caption,
        )


def _steps_in_short(schedule: str) -> str:
    """ "1x4x4:20,1x2x2:30" as "20 of 4, 30 of 2"."""
    stages = [stage.split(":") for stage in schedule.split(",")]
    return ", ".join(f"{count} of {size.split('x')[-1]}" for size, count in stages)


def rows(points: Sequence[CurvePoint]) -> list[Row]:
    """Means and ranges over the seeds, in the order in which schedules were measured."""
    order = {key: i for i, key in reversed(list(enumerate(_key(p) for p in points)))}
    ordered = sorted(points, key=lambda p: (order[_key(p)], p.seed))
    return [_row(list(group)) for _, group in groupby(ordered, _key)]


def _key(point: CurvePoint) -> tuple[str, str]:
    return point.series, point.schedule


def _row(points: list[CurvePoint]) -> Row:
    distances, agreements = [p.frechet for p in points], [p.agreement for p in points]
    return Row(
        series=points[0].series,
        relative_flops=points[0].relative_flops,
        schedule=points[0].schedule,
        milliseconds=1000 * fmean(p.seconds_per_image for p in points),
        frechet=fmean(distances),
        lowest=min(distances),
        highest=max(distances),
        accuracy=fmean(p.accuracy or 0.0 for p in points),
        agreement=None if None in agreements else fmean(a for a in agreements if a is not None),
    )


def _headings(recipe: Recipe[Any]) -> tuple[str, ...]:
    return CAPTION_HEADINGS if recipe.settings.has_captions else HEADINGS


def print_table(points: Sequence[CurvePoint], floor: float, recipe: Recipe[Any], console: Console) -> None:
    """The table, and what its numbers are."""
    grid = Table(title="Quality against compute", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in _headings(recipe):
        grid.add_column(name, justify="left" if name == HEADINGS[0] else "right", no_wrap=True)
    previous = ""
    for row in rows(points):
        if previous and row.series != previous:
            grid.add_section()
        grid.add_row(*row.cells())
        previous = row.series
    console.print(grid)
    console.print(f"{_what(points[0])} Real against real: {floor:.2f}.", soft_wrap=True)


def _what(point: CurvePoint) -> str:
    text = "" if point.agreement is None else " Text: the share of what captions say that the samples show."
    return (
        f"Frechet distance in the features of a small classifier trained on the same digits, "
        f"{point.num_samples} samples against {point.reference}; mean and range over seeds. "
        "Class: how often that classifier sees the digit that was asked for. ms: time of one image."
        f"{text}"
    )


def draw_samples(model: Any, recipe: Recipe[Any], path: Path) -> Path:
    """One row per weak-first budget, all from the same noise, below a row of real digits."""
    settings = recipe.settings
    y, real, columns = recipe.pictured()
    grid = [GridRow(real, "real", "scikit-learn's digits")]
    for candidate in schedules(model, settings):
        if candidate.series == "weak first":
            sampler = Sampler(model, schedule=candidate.schedule, cfg_scale=settings.cfg_scale)
            images = sampler(y, generator=torch.Generator().manual_seed(settings.seed))
            grid.append(GridRow(images, f"{candidate.budget:.0%} of the FLOPs", str(candidate.schedule)))
    return save_grid(grid, path, "The same noise at several budgets: large patches first, small ones later", columns)


def draw_curve(points: Sequence[CurvePoint], floor: float, recipe: Recipe[Any], path: Path) -> Path:
    """Quality against FLOPs for the three ways to save."""
    return plot_curve(with_shared_ends(points), path, recipe.plot_title, floor)


def write_report(points: Sequence[CurvePoint], judge: Judge, promise: str, recipe: Recipe[Any], out: Path) -> Path:
    """``report.html``: pictures, table, what was done, what it does not show."""
    return report.write_page(
        out / "report.html", "FlexiDiT on real handwritten digits", _parts(points, judge, promise, recipe, out)
    )


def _parts(points: Sequence[CurvePoint], judge: Judge, promise: str, recipe: Recipe[Any], out: Path) -> Iterator[str]:
    table, settings = rows(points), recipe.settings
    yield report.paragraph(_summary(table), "lead")
    yield report.picture((out / "samples.png").read_bytes(), "samples, one row per budget")
    yield report.picture((out / "curve.png").read_bytes(), "quality against relative FLOPs")
    yield report.heading("The numbers")
    yield report.table(_headings(recipe), (row.cells() for row in table))
    yield report.paragraph(f"{_what(points[0])} As many real digits against all of them: {judge.floor:.2f}.")
    yield report.heading("What was done")
    yield report.bullets([*recipe.steps(), promise, _sampling(settings)])
    yield report.heading("What this does not show")
    yield report.bullets([*recipe.limits(), *_limits(settings)])
    yield report.heading("Again, and further")
    yield report.preformatted(
        f"flexidit quickstart --recipe {settings.recipe} --out {out}     # again; what exists is not made again\n"
        f"{recipe.example(out)} --budget 0.6 --steps {settings.num_sampling_steps} "
        f"--cfg-scale {settings.cfg_scale} --out runs/samples\n"
        f"tensorboard --logdir {out}/tensorboard             # losses per patch size, the weak-powerful gap"
    )
    yield report.heading("Settings")
    yield report.preformatted(settings.to_yaml())


def _summary(table: Sequence[Row]) -> str:
    first = [row for row in table if row.series == "weak first"]
    full = first[0]
    good = [row for row in first if row.frechet <= full.highest or row.frechet <= 1.1 * full.frechet]
    cheapest = min(good, key=lambda row: row.relative_flops)
    return (
        f"One small transformer, two patch sizes. With large patches first and small ones later it reaches a Frechet "
        f"distance of {cheapest.frechet:.2f}{_in_agreement(cheapest)} at {cheapest.relative_flops:.0%} of the compute; "
        f"at full compute it is {full.frechet:.2f}{_in_agreement(full)}, with large patches only "
        f"{first[-1].frechet:.2f}{_in_agreement(first[-1])}."
    )


def _in_agreement(row: Row) -> str:
    return "" if row.agreement is None else f" (captions {row.agreement:.0%} true)"


def _sampling(settings: QuickstartSettings) -> str:
    return (
        f"Samples: DDPM with {settings.num_sampling_steps} steps and guidance {settings.cfg_scale}; the cost of a "
        "schedule counts both predictions of every step, captions included."
    )


def _limits(settings: QuickstartSettings) -> list[str]:
    return [
        "Milliseconds are those of this machine. Sequences of 4 and 16 tokens keep no processor busy, so time falls "
        "less than FLOPs; how closely it follows them depends on the model, the batch and the device.",
        f"The judge is a small classifier and {settings.num_samples} samples a seed: differences below the range over "
        "seeds say nothing.",
        "Nine of ten reference digits were trained on: the distance does not tell samples that are new from samples "
        "that are remembered.",
    ]
