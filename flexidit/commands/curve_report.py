"""The pages of ``flexidit curve``: its figures against FLOPs and against time, its table, one self-contained file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flexidit import report
from flexidit.files import write_atomically
from flexidit.metrics.curve_points import CurvePoint
from flexidit.plots import curve_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADINGS = (
    "series",
    "budget",
    "FLOPs",
    "GFLOPs an image",
    "seconds an image",
    "Frechet distance",
    "accuracy",
    "seeds",
)


def table_rows(points: Sequence[CurvePoint]) -> Iterator[tuple[str, ...]]:
    """Cells of the table, one row per series and budget, the mean and the range over seeds."""
    for (series, budget), group in _by_schedule(points).items():
        distances = [point.frechet for point in group]
        spread = f" ({min(distances):.3f} to {max(distances):.3f})" if len(group) > 1 else ""
        accuracies = [point.accuracy for point in group if point.accuracy is not None]
        yield (
            series,
            f"{budget:g}",
            f"{group[0].relative_flops:.1%}",
            f"{group[0].flops_per_image / 1e9:,.2f}",
            f"{fmean(point.seconds_per_image for point in group):.3g}",
            f"{fmean(distances):.3f}{spread}",
            f"{fmean(accuracies):.1%}" if accuracies else "-",
            str(len(group)),
        )


def write_report(out: Path, header: Mapping[str, Any], points: Sequence[CurvePoint]) -> None:
    """``curve.png`` against FLOPs, ``latency.png`` against time, and both with all numbers in ``curve.html``.

    Args:
        out: Folder.
        header: ``settings`` of the curve, and ``floor``, the Frechet distance of real images, or None.
        points: At least one.
    """
    pictures = {
        "curve.png": _png(curve_figure(points, floor=header["floor"])),
        "latency.png": _png(_timed(points, header)),
    }
    for name, content in pictures.items():
        write_atomically(out / name, content)
    report.write_page(out / "curve.html", "Quality against compute", _parts(header, points, list(pictures.values())))


def _timed(points: Sequence[CurvePoint], header: Mapping[str, Any]) -> Figure:
    """The same figure against seconds, the mean over seeds, as one machine measured them."""
    seconds = {key: fmean(point.seconds_per_image for point in group) for key, group in _by_schedule(points).items()}
    moved = [replace(point, relative_flops=seconds[_key(point)]) for point in points]
    figure = curve_figure(moved, "Quality against time", header["floor"])
    axes, settings = figure.axes[0], header["settings"]
    axes.set_xlabel(f"seconds an image ({settings['device']}, {settings['precision']}, batch {settings['batch_size']})")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:.3g} s")
    return figure


def _key(point: CurvePoint) -> tuple[str, float]:
    return point.series, point.budget


def _by_schedule(points: Sequence[CurvePoint]) -> dict[tuple[str, float], list[CurvePoint]]:
    """All seeds of each series and budget."""
    groups: dict[tuple[str, float], list[CurvePoint]] = defaultdict(list)
    for point in points:
        groups[_key(point)].append(point)
    return groups


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=160, format="png")
    return buffer.getvalue()


def _parts(header: Mapping[str, Any], points: Sequence[CurvePoint], pictures: Sequence[bytes]) -> Iterator[str]:
    """Pictures, numbers, settings."""
    yield from (report.picture(content, "quality against compute") for content in pictures)
    yield report.table(HEADINGS, table_rows(points))
    if header["floor"] is not None:
        yield report.paragraph(f"Real images against the reference: {header['floor']:.3f}.")
    yield report.heading("Settings")
    yield report.table(("name", "value"), ((name, json.dumps(value)) for name, value in header["settings"].items()))
