"""Figures: quality against compute, and the gap between weak and powerful predictions over time.

Drawn on matplotlib's ``Figure`` without pyplot: no display, no global state, safe in any thread.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeAlias

from flexidit.metrics.curve_points import CurvePoint
from flexidit.patch_size import PatchSize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _FAINT, _RULE = "#20242c", "#707680", "#d9dce1"
_COLOURS = {"weak first": "#1f6fd6", "fewer steps": "#5f6b7a", "weak last": "#e07b1a"}
_OTHER_COLOURS = ("#2a9d5c", "#a04bbf", "#c23b4e", "#1aa6b7")

_End: TypeAlias = "tuple[float, float, str, str]"
"""Where a line ends (x, y), its name, its colour."""


def curve_figure(points: Iterable[CurvePoint], title: str = "", floor: float | None = None) -> Figure:
    """Frechet distance against relative FLOPs, one line a series; the mean and the range over seeds.

    Compute falls from left to right: the line is flat as long as saving costs nothing, then it rises.

    Args:
        points: Measured points, in any order; at least one.
        title: The message.
        floor: Frechet distance of real images against real ones: no sampler does better but by luck.
    """
    points = list(points)
    figure, axes = _figure(title or "Quality against compute", _caption(points))
    ends = [
        _draw_series(axes, name, _means(series), _COLOURS.get(name, _OTHER_COLOURS[i % len(_OTHER_COLOURS)]))
        for i, (name, series) in enumerate(_by_series(points).items())
    ]
    axes.invert_xaxis()
    axes.set_xlabel("FLOPs of sampling, relative to the powerful patch size at every step", color=_FAINT)
    axes.set_ylabel("Fr\u00e9chet distance (lower is better)", color=_FAINT)
    axes.xaxis.set_major_formatter(lambda value, position: f"{100 * value:.0f} %")
    axes.set_ylim(0, 1.08 * max(point.frechet for point in points) or 1.0)
    if floor is not None:
        axes.axhline(floor, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ends.append((axes.get_xlim()[1], floor, "real against real", _FAINT))  # the right end
    _label_ends(axes, ends)
    return figure


def plot_curve(
    points: Iterable[CurvePoint], path: str | os.PathLike[str], title: str = "", floor: float | None = None
) -> Path:
    """Write :func:`curve_figure` to a file, making the folder; returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    curve_figure(points, title, floor).savefig(target, dpi=160)
    return target


def gap_figure(timesteps: Sequence[int], gap: Mapping[PatchSize, Any]) -> Figure:
    """Difference of weak and powerful predictions over time, one line a weak patch size (paper, Fig. 4 right).

    Args:
        timesteps: Train timesteps, 0 data to 999 noise.
        gap: Values at these timesteps by weak patch size, a tensor or a sequence each.
    """
    figure, axes = _figure("Where weak predictions differ from powerful ones", "mean squared difference of predictions")
    ends: list[_End] = []
    for (size, values), colour in zip(gap.items(), (*_COLOURS.values(), *_OTHER_COLOURS), strict=False):
        heights = [float(value) for value in values]
        axes.plot(timesteps, heights, color=colour, linewidth=2, marker="o", markersize=4)
        ends.append((float(timesteps[-1]), heights[-1], f"patch {size.name}", colour))
    axes.set_xlabel("timestep (0: data, 999: noise)", color=_FAINT)
    axes.set_ylabel("gap", color=_FAINT)
    axes.set_ylim(bottom=0)
    _label_ends(axes, ends)
    return figure


def _figure(title: str, caption: str) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.13, 0.73, 0.66))
    figure.text(0.035, 0.935, title, fontsize=14, fontweight="bold", color=_INK)
    figure.text(0.035, 0.91, fill(caption, 125), fontsize=8.5, color=_FAINT, va="top", linespacing=1.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.tick_params(colors=_FAINT, length=0)
    axes.grid(axis="y", color=_RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_series(axes: Any, name: str, means: list[tuple[float, float, float, float]], colour: str) -> _End:
    """Line, points and range over seeds; returns where its label goes, the end of least compute."""
    x, y, low, high = zip(*means, strict=True)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    front = 4 if name == "weak first" else 3
    axes.plot(x, y, color=colour, linewidth=2.4 if front == 4 else 1.6, marker="o", markersize=5, zorder=front)
    return (x[0], y[0], name, colour)


def _label_ends(axes: Any, ends: list[_End]) -> None:
    """Write each line's name in its colour: in the margin, names moved apart, or above an end short of the margin."""
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    spacing = 0.055 * (high - low)
    height = low - spacing
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        if abs(right - x) > 0.1 * abs(right - left):
            axes.annotate(name, (x, y), (4, 8), textcoords="offset points", color=colour, ha="right", fontsize=10)
            continue
        height = max(y, height + spacing)
        place = {"xycoords": axes.get_yaxis_transform(), "annotation_clip": False, "va": "center", "fontsize": 10}
        axes.annotate(name, (1.02, height), color=colour, **place)


def _by_series(points: Iterable[CurvePoint]) -> dict[str, list[CurvePoint]]:
    series: dict[str, list[CurvePoint]] = defaultdict(list)
    for point in points:
        series[point.series].append(point)
    return series


def _means(points: Iterable[CurvePoint]) -> list[tuple[float, float, float, float]]:
    """(relative FLOPs, mean, lowest, highest) over seeds, by rising FLOPs."""
    distances: dict[float, list[float]] = defaultdict(list)
    for point in points:
        distances[point.relative_flops].append(point.frechet)
    return [(x, sum(y) / len(y), min(y), max(y)) for x, y in sorted(distances.items())]


def _caption(points: Sequence[CurvePoint]) -> str:
    """Who measured what: without it the numbers compare with nothing."""
    first, num_seeds = points[0], len({point.seed for point in points})
    seeds = f"{num_seeds} seeds (band: their range)" if num_seeds > 1 else f"seed {first.seed}"
    return (
        f"{first.evaluator}; reference: {first.reference}; {first.num_samples:,} samples a point, {seeds}; "
        f"{first.solver}, {max(point.num_sampling_steps for point in points)} steps at 100 %; "
        f"guidance {first.cfg_scale:g}; {first.codec}"
    )
