"""The pages of ``flexidit curve``: its figures against FLOPs and against time, its table, one self-contained file."""

from __future__ import annotations

import base64
import html
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flexidit.latent_shards import write_atomically
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
    write_atomically(out / "curve.html", _page(header, points, list(pictures.values())).encode())


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


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#20242c;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1.5rem 0}td,th{text-align:right;padding:.3rem .8rem;"
    "border-bottom:1px solid #d9dce1}td:first-child,th:first-child{text-align:left}th{color:#707680;font-weight:500}"
    "img{max-width:100%}"
)


def _page(header: Mapping[str, Any], points: Sequence[CurvePoint], pictures: Sequence[bytes]) -> str:
    """One file with pictures inside: it can be sent and opened anywhere."""
    images = "".join(
        f'<p><img alt="curve" src="data:image/png;base64,{base64.b64encode(content).decode()}"></p>'
        for content in pictures
    )
    settings = [(name, json.dumps(value)) for name, value in header["settings"].items()]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Quality against compute</title>'
        f"<style>{_STYLE}</style></head><body><h1>Quality against compute</h1>{images}"
        f"{_table(HEADINGS, table_rows(points))}{_floor_sentence(header['floor'])}"
        f"<h2>Settings</h2>{_table(('name', 'value'), settings)}</body></html>\n"
    )


def _table(headings: Sequence[str], rows: Iterable[tuple[str, ...]]) -> str:
    first = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{first}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _floor_sentence(floor: float | None) -> str:
    return "" if floor is None else f"<p>Real images against the reference: {floor:.3f}.</p>"
