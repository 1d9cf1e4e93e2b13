"""Figures: quality against compute, and the gap between weak and powerful predictions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flexidit.metrics.curve_candidates import MIXTURE
from flexidit.metrics.curve_points import CurvePoint
from flexidit.patch_size import PatchSize
from flexidit.plot_parts import (
    COLOURS,
    FAINT,
    FRECHET,
    OTHER_COLOURS,
    Measure,
    Spot,
    caption_of,
    group_by,
    label_scales,
    measured,
    new_figure,
    percent,
    set_measure,
    spot_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Against = Literal["FLOPs", "time"]

_End: TypeAlias = "tuple[float, float, str, str]"
"""Where a line ends (x, y), its name, its colour."""


def curve_figure(
    points: Iterable[CurvePoint], title: str = "", floor: float | None = None, against: Against = "FLOPs"
) -> Figure:
    """Quality against what sampling costs, one line a series; the mean and the range over seeds.

    A panel for the Frechet distance, and one for each other measure that the points have. Where several guidance scales
    were measured, each spot is that with the lowest Frechet distance, and says which scale.

    Compute falls from left to right: the line is flat as long as saving costs nothing, then quality is lost. Mixtures
    of patch sizes are spots without a line: nothing lies between two of them.

    Args:
        points: Measured points, in any order; at least one.
        title: The message.
        floor: Frechet distance of real images against real ones: no sampler does better but by luck.
        against: "FLOPs", relative to the full budget; or "time", seconds a sample as one machine measured them.
    """
    points = list(points)
    best = at_best_guidance(points)
    measures = [FRECHET, *measured(points)]
    caption = caption_of(points, seeds=" (band: their range)", scales=", the best one written at each spot")
    figure, panels = new_figure(title or _TITLES[against], caption, len(measures))
    for axes, measure in zip(panels, measures, strict=True):
        spots, ends = _draw_curve(axes, best, measure, against)
        if len({point.cfg_scale for point in points}) > 1:
            label_scales(axes, spots)
        if floor is not None and measure is FRECHET:
            ends.append(_draw_floor(axes, floor))
        _label_ends(axes, ends)
    return figure


_TITLES: dict[str, str] = {"FLOPs": "Quality against compute", "time": "Quality against time"}


def plot_curve(
    points: Iterable[CurvePoint], path: str | os.PathLike[str], title: str = "", floor: float | None = None
) -> Path:
    """Write :func:`curve_figure` to a file, making the folder; returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    curve_figure(points, title, floor).savefig(target, dpi=160)
    return target


def at_best_guidance(points: Iterable[CurvePoint]) -> list[CurvePoint]:
    """Of each schedule in a series the points at the guidance scale of the lowest Frechet distance, mean over seeds."""
    result = []
    groups = group_by(points, lambda point: (point.series, point.budget, point.schedule, point.relative_flops))
    for group in groups.values():
        scales = group_by(group, lambda point: point.cfg_scale)
        result += min(scales.values(), key=lambda same: fmean(point.frechet for point in same))
    return result


def gap_figure(timesteps: Sequence[int], gap: Mapping[PatchSize, Any]) -> Figure:
    """Difference of weak and powerful predictions over time, one line a weak patch size (paper, Fig. 4 right).

    Args:
        timesteps: Train timesteps, 0 data to 999 noise.
        gap: Values at these timesteps by weak patch size, a tensor or a sequence each.
    """
    caption = "mean squared difference of predictions"
    figure, (axes,) = new_figure("Where weak predictions differ from powerful ones", caption)
    ends: list[_End] = []
    for (size, values), colour in zip(gap.items(), (*COLOURS.values(), *OTHER_COLOURS), strict=False):
        heights = [float(value) for value in values]
        axes.plot(timesteps, heights, color=colour, linewidth=2, marker="o", markersize=4)
        ends.append((float(timesteps[-1]), heights[-1], f"patch {size.name}", colour))
    axes.set_xlabel("timestep (0: data, 999: noise)", color=FAINT)
    axes.set_ylabel("gap", color=FAINT)
    axes.set_ylim(bottom=0)
    _label_ends(axes, ends)
    return figure


def _draw_curve(
    axes: Any, points: Sequence[CurvePoint], measure: Measure, against: Against
) -> tuple[list[tuple[Spot, str]], list[_End]]:
    """The lines of one panel of :func:`curve_figure`: their spots with their colours, and where they end."""
    labelled: list[tuple[Spot, str]] = []
    ends: list[_End] = []
    for index, (name, series) in enumerate(group_by(points, lambda point: point.series).items()):
        colour = COLOURS.get(name, OTHER_COLOURS[index % len(OTHER_COLOURS)])
        spots = _spots(series, measure.field, against)
        labelled += [(spot, colour) for spot in spots]
        ends.append(_draw_series(axes, name, spots, colour))
    axes.invert_xaxis()
    _label_axes(axes, points, measure, against)
    return labelled, ends


def _draw_floor(axes: Any, floor: float) -> _End:
    axes.axhline(floor, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return axes.get_xlim()[1], floor, "real against real", FAINT  # the right end


def _label_axes(axes: Any, points: Sequence[CurvePoint], measure: Measure, against: Against) -> None:
    first = points[0]
    if against == "time":
        how = f"{first.device}, {first.precision}, batch {first.batch_size}"
        axes.set_xlabel(f"seconds {first.a_sample} ({how})", color=FAINT)
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:.3g}")
        axes.locator_params(axis="x", nbins=6)
    else:
        axes.set_xlabel("FLOPs of sampling, relative to the powerful patch size at every step", color=FAINT)
        axes.xaxis.set_major_formatter(percent)
    set_measure(axes.yaxis, measure)
    if measure.field.startswith("frechet"):
        axes.set_ylim(0, 1.08 * max(getattr(point, measure.field) for point in points) or 1.0)
        if axes.get_ylim()[1] >= 10_000:  # the margin has room for four digits
            axes.yaxis.set_major_formatter(lambda value, position: f"{value / 1000:g}k")
    else:
        _widen(axes, measure.least_span)


def _widen(axes: Any, least_span: float) -> None:
    """Let the axis span so much at least: noise of a fraction of it is not to look like a trend."""
    low, high = axes.get_ylim()
    missing = max(0.0, least_span - (high - low))
    axes.set_ylim(low - missing / 2, high + missing / 2)


def _draw_series(axes: Any, name: str, spots: Sequence[Spot], colour: str) -> _End:
    """Line, points and range over seeds; returns where its label goes, the end of least cost."""
    x, y, low, high, _ = zip(*spots, strict=True)
    front = 4 if name.startswith("weak first") else 3
    style: dict[str, Any] = {"linewidth": 2.4 if front == 4 else 1.6, "marker": "o", "markersize": 5}
    if name == MIXTURE:
        axes.vlines(x, low, high, color=colour, alpha=0.4, linewidth=3)
        front, style = 5, style | {"linestyle": "none", "marker": "D", "markersize": 6}
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, y, color=colour, zorder=front, **style)
    return (x[0], y[0], name, colour)


def _label_ends(axes: Any, ends: list[_End]) -> None:
    """Write each line's name in its colour: in the margin, names moved apart; a single short end above itself."""
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    spacing = 0.06 * (high - low)
    short = [end for end in ends if abs(right - end[0]) > 0.1 * abs(right - left)]
    if len(short) == 1:
        ((x, y, name, colour),) = short
        axes.annotate(name, (x, y), (4, 8), textcoords="offset points", color=colour, ha="right", fontsize=10)
        ends = [end for end in ends if end not in short]
    height = low - spacing
    for place_left, (_, y, name, colour) in zip(range(len(ends), 0, -1), sorted(ends, key=_height), strict=True):
        height = max(min(y, high - spacing * (place_left - 1)), height + spacing)
        place = {"xycoords": axes.get_yaxis_transform(), "annotation_clip": False, "va": "center", "fontsize": 10}
        axes.annotate(name, (1.02, height), color=colour, **place)


def _height(end: _End) -> float:
    return end[1]


def _spots(points: Iterable[CurvePoint], field: str, against: Against) -> list[Spot]:
    """Means and ranges over seeds, by rising cost."""
    groups = group_by(points, lambda p: (p.relative_flops, p.budget, p.schedule, p.cfg_scale)).values()
    cost = "relative_flops" if against == "FLOPs" else "seconds_per_image"
    return sorted(spot_of(group, fmean(getattr(point, cost) for point in group), field) for group in groups)
