"""What the quick start shows: the table, the curve, the samples and the page that explains them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flexidit import report
from flexidit.commands.quickstart.evaluation import with_shared_ends
from flexidit.commands.quickstart.judge import Judge
from flexidit.commands.quickstart.recipe import Recipe
from flexidit.commands.quickstart.settings import QuickstartSettings
from flexidit.metrics.curve_points import CurvePoint
from flexidit.plots import plot_curve

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
    is_clip: bool = False

    def cells(self) -> tuple[str, ...]:
        """As :data:`HEADINGS` name them, or :data:`CAPTION_HEADINGS`."""
        caption = () if self.agreement is None else (f"{self.agreement:.1%}",)
        return (
            self.series,
            f"{self.relative_flops:.0%}",
            _steps_in_short(self.schedule, self.is_clip),
            f"{self.milliseconds:.1f}",
            _distance(self.frechet),
            _range(self.lowest, self.highest),
            f"{self.accuracy:.1%}",
            *caption,
        )


def _distance(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _range(lowest: float, highest: float) -> str:
    return f"{lowest:.0f}-{highest:.0f}" if highest >= 100 else f"{lowest:.2f}-{highest:.2f}"


def _steps_in_short(schedule: str, is_clip: bool) -> str:
    """ "1x4x4:20,1x2x2:30" as "20 of 4, 30 of 2"; of clips with whole sizes."""
    stages = [stage.split(":") for stage in schedule.split(",")]
    return ", ".join(f"{count} of {size if is_clip else size.split('x')[-1]}" for size, count in stages)


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
        is_clip=points[0].sample == "clip",
    )


def _headings(recipe: Recipe[Any]) -> tuple[str, ...]:
    return CAPTION_HEADINGS if recipe.settings.has_captions else HEADINGS


def print_table(points: Sequence[CurvePoint], floor: float, recipe: Recipe[Any], console: Console) -> None:
    """The table, and what its numbers are."""
    grid = Table(title="Quality against compute", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in _headings(recipe):
        grid.add_column(name, justify="left" if name == HEADINGS[0] else "right", no_wrap=name != HEADINGS[2])
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
        f"Frechet distance {'over whole clips ' if point.sample == 'clip' else ''}in the features of a small "
        "classifier trained on the same digits, "
        f"{point.num_samples} samples against {point.reference}; mean and range over seeds. "
        "Class: how often that classifier sees the digit that was asked for. "
        f"ms: time of one {point.sample}."
        f"{text}"
    )


def draw_curve(points: Sequence[CurvePoint], floor: float, recipe: Recipe[Any], path: Path) -> Path:
    """Quality against FLOPs for the three ways to save."""
    return plot_curve(with_shared_ends(points), path, recipe.plot_title, floor)


def write_report(
    points: Sequence[CurvePoint], judge: Judge, promise: str, pictures: Sequence[str], recipe: Recipe[Any], out: Path
) -> Path:
    """``report.html``: pictures, table, what was done, what it does not show."""
    parts = _parts(points, judge, promise, pictures, recipe, out)
    return report.write_page(out / "report.html", "FlexiDiT on real handwritten digits", parts)


def _parts(
    points: Sequence[CurvePoint], judge: Judge, promise: str, pictures: Sequence[str], recipe: Recipe[Any], out: Path
) -> Iterator[str]:
    table, settings = rows(points), recipe.settings
    yield report.paragraph(_summary(table), "lead")
    for name in pictures:
        kind = name.rpartition(".")[2]
        yield report.picture((out / name).read_bytes(), "the same noise at several budgets", kind)
    yield report.picture((out / "curve.png").read_bytes(), "quality against relative FLOPs")
    yield report.heading("The numbers")
    yield report.table(_headings(recipe), (row.cells() for row in table))
    yield report.paragraph(f"{_what(points[0])} As many real digits against all of them: {judge.floor:.2f}.")
    yield report.heading("What was done")
    yield report.bullets([*recipe.steps(), promise, _sampling(points[0], settings)])
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
    full = max(table, key=lambda row: row.relative_flops)
    first = [row for row in table if row.series not in ("weak last", "fewer steps")]
    good = [row for row in first if row.frechet <= full.highest or row.frechet <= 1.1 * full.frechet]
    cheapest, weakest = (min(some, key=lambda row: row.relative_flops) for some in (good, first))
    return (
        f"One small transformer, several patch sizes. With large patches first and small ones later it reaches a "
        f"Frechet distance of {_distance(cheapest.frechet)}{_in_agreement(cheapest)} at "
        f"{cheapest.relative_flops:.0%} of the compute; at full compute it is "
        f"{_distance(full.frechet)}{_in_agreement(full)}, with large patches only "
        f"{_distance(weakest.frechet)}{_in_agreement(weakest)}."
    )


def _in_agreement(row: Row) -> str:
    return "" if row.agreement is None else f" (captions {row.agreement:.0%} true)"


def _sampling(point: CurvePoint, settings: QuickstartSettings) -> str:
    return (
        f"Samples: {point.solver} with {settings.num_sampling_steps} steps and guidance {settings.cfg_scale}; the cost "
        "of a schedule counts both predictions of every step, captions included."
    )


def _limits(settings: QuickstartSettings) -> list[str]:
    return [
        "Milliseconds are those of this machine. Short sequences keep no processor busy, so time falls less than "
        "FLOPs; how closely it follows them depends on the model, the batch and the device.",
        f"The judge is a small classifier and {settings.num_samples} samples a seed: differences below the range over "
        "seeds say nothing.",
        "Nine of ten reference digits were trained on: the distance does not tell samples that are new from samples "
        "that are remembered.",
    ]
