"""The pages of ``flexidit curve``: figures against FLOPs, time and guidance, a table, one self-contained file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from flexidit import report
from flexidit.files import write_atomically
from flexidit.guidance_plot import guidance_figure
from flexidit.metrics.curve_candidates import MIXTURE
from flexidit.metrics.curve_points import CurvePoint
from flexidit.plots import curve_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Column(NamedTuple):
    """A column of the table."""

    heading: str
    """Where it says {a_sample}, "an image" or "a clip" stands in the table."""
    cell: Callable[[Sequence[CurvePoint]], str]
    """Of a row: points that differ in their seed only."""
    is_shown: Callable[[Sequence[CurvePoint]], bool] = bool
    """Whether a table of these points has the column."""


def _mean(field: str, spelling: str) -> Callable[[Sequence[CurvePoint]], str]:
    def cell(row: Sequence[CurvePoint]) -> str:
        values = [getattr(point, field) for point in row if getattr(point, field) is not None]
        return format(fmean(values), spelling) if values else "-"

    return cell


def _frechet(row: Sequence[CurvePoint]) -> str:
    values = [point.frechet for point in row]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(row) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def _has(field: str) -> Callable[[Sequence[CurvePoint]], bool]:
    return lambda points: any(getattr(point, field) is not None for point in points)


def is_sweep(points: Sequence[CurvePoint]) -> bool:
    """Whether several guidance scales were measured."""
    return len({point.cfg_scale for point in points}) > 1


def _has_mixtures(points: Sequence[CurvePoint]) -> bool:
    """Whether the budget alone does not say what ran."""
    return any(point.series == MIXTURE for point in points)


_COLUMNS = (
    _Column("series", lambda row: row[0].series),
    _Column("budget", lambda row: f"{row[0].budget:g}"),
    _Column("schedule", lambda row: row[0].schedule, _has_mixtures),
    _Column("guidance", lambda row: f"{row[0].cfg_scale:g}", is_sweep),
    _Column("FLOPs", lambda row: f"{row[0].relative_flops:.1%}"),
    _Column("GFLOPs {a_sample}", lambda row: f"{row[0].flops_per_image / 1e9:,.2f}"),
    _Column("seconds {a_sample}", _mean("seconds_per_image", ".3g")),
    _Column("Frechet distance", _frechet),
    _Column("Frechet distance of frames", _mean("frechet_frames", ".3f"), _has("frechet_frames")),
    _Column("accuracy", _mean("accuracy", ".1%"), _has("accuracy")),
    _Column("agreement", _mean("agreement", ".1%"), _has("agreement")),
    _Column("CLIP score", _mean("clip_score", ".2f"), _has("clip_score")),
    _Column("flicker", _mean("flicker", ".4f"), _has("flicker")),
    _Column("smoothness", _mean("smoothness", ".4f"), _has("smoothness")),
    _Column("seeds", lambda row: str(len(row))),
)


def table_headings(points: Sequence[CurvePoint]) -> tuple[str, ...]:
    """Of the columns that these points need: those in which nothing is known, or all guidance is one, are left out."""
    return tuple(column.heading.format(a_sample=points[0].a_sample) for column in _shown(points))


def table_rows(points: Sequence[CurvePoint]) -> Iterator[tuple[str, ...]]:
    """Cells of the table, one row per series, schedule and guidance: the mean and the range over seeds."""
    columns = _shown(points)
    rows: dict[Any, list[CurvePoint]] = defaultdict(list)
    for point in points:
        rows[point.series, point.budget, point.schedule, point.cfg_scale].append(point)
    for row in rows.values():
        yield tuple(column.cell(row) for column in columns)


def _shown(points: Sequence[CurvePoint]) -> list[_Column]:
    return [column for column in _COLUMNS if column.is_shown(points)]


def write_report(out: Path, header: Mapping[str, Any], points: Sequence[CurvePoint]) -> list[str]:
    """Figures, and all of them with all numbers in ``curve.html``; returns the names of the files.

    ``curve.png`` is quality against FLOPs, ``latency.png`` against time, and, where several guidance scales were
    measured, ``guidance.png`` what guidance trades at each budget.

    Args:
        out: Folder.
        header: ``settings`` of the curve; ``floor``, the Frechet distance of real images, or None; ``notes``, sentences
            about the numbers.
        points: At least one.
    """
    pictures = {
        "curve.png": curve_figure(points, floor=header["floor"]),
        "latency.png": curve_figure(points, floor=header["floor"], against="time"),
    }
    if is_sweep(points):
        pictures["guidance.png"] = guidance_figure(points)
    contents = {name: _png(figure) for name, figure in pictures.items()}
    for name, content in contents.items():
        write_atomically(out / name, content)
    report.write_page(out / "curve.html", "Quality against compute", _parts(header, points, list(contents.values())))
    return [*contents, "curve.html"]


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=160, format="png")
    return buffer.getvalue()


def _parts(header: Mapping[str, Any], points: Sequence[CurvePoint], pictures: Sequence[bytes]) -> Iterator[str]:
    """Pictures, numbers, settings."""
    yield from (report.picture(content, "quality against compute") for content in pictures)
    yield report.table(table_headings(points), table_rows(points))
    if header["floor"] is not None:
        yield report.paragraph(f"Real {points[0].sample}s against the reference: {header['floor']:.3f}.")
    yield from map(report.paragraph, header.get("notes", ()))
    yield report.heading("Settings")
    yield report.table(("name", "value"), ((name, json.dumps(value)) for name, value in header["settings"].items()))
