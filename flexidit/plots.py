"""Figures: quality against compute, quality under guidance, and the gap between weak and powerful predictions.

Drawn on matplotlib's ``Figure`` without pyplot: no display, no global state, safe in any thread.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

from flexidit.metrics.curve_points import CurvePoint
from flexidit.patch_size import PatchSize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _FAINT, _RULE = "#20242c", "#707680", "#d9dce1"
_COLOURS = {"weak first": "#1f6fd6", "fewer steps": "#5f6b7a", "weak last": "#e07b1a"}
_OTHER_COLOURS = ("#2a9d5c", "#a04bbf", "#c23b4e", "#1aa6b7")
_BUDGET_COLOURS = (_INK, "#1f6fd6", "#12a5a0", "#7aa51c", "#e39a12", "#d5502f", "#a04bbf")
"""From all compute to little; after these they repeat."""
_FEW = 6
"""Spots of a line that can all be labelled."""
_DASHES = {"weak last": "--", "fewer steps": ":"}
_LINE_NAMES = {"-": "solid", "--": "dashed", ":": "dotted"}

Against = Literal["FLOPs", "time"]
Key = TypeVar("Key")

_End: TypeAlias = "tuple[float, float, str, str]"
"""Where a line ends (x, y), its name, its colour."""


class _Measure(NamedTuple):
    """A field of :class:`CurvePoint` on an axis."""

    field: str
    label: str
    is_share: bool = False
    least_span: float = 0.0
    """Of its axis, where the axis does not begin at zero."""


_FRECHET = _Measure("frechet", "Fr\u00e9chet distance (lower is better)")
_ALIGNMENTS = (
    _Measure("agreement", "caption agreement (higher is better)", is_share=True, least_span=0.1),
    _Measure("clip_score", "CLIP score (higher is better)", least_span=2.0),
)
_GUIDANCE = _Measure("cfg_scale", "guidance scale")


class _Spot(NamedTuple):
    """Measurements that differ in their seed only."""

    x: float
    mean: float
    low: float
    high: float
    cfg_scale: float


def curve_figure(
    points: Iterable[CurvePoint], title: str = "", floor: float | None = None, against: Against = "FLOPs"
) -> Figure:
    """Quality against what sampling costs, one line a series; the mean and the range over seeds.

    A panel for the Frechet distance, and one for each measure of agreement with captions that the points have. Where
    several guidance scales were measured, each spot is that with the lowest Frechet distance, and says which scale.

    Compute falls from left to right: the line is flat as long as saving costs nothing, then quality is lost.

    Args:
        points: Measured points, in any order; at least one.
        title: The message.
        floor: Frechet distance of real images against real ones: no sampler does better but by luck.
        against: "FLOPs", relative to the full budget; or "time", seconds an image as one machine measured them.
    """
    points = list(points)
    best = at_best_guidance(points)
    measures = [_FRECHET, *_measured(points)]
    caption = _caption(points, seeds=" (band: their range)", scales=", the best one written at each spot")
    figure, panels = _figure(title or _TITLES[against], caption, len(measures))
    for axes, measure in zip(panels, measures, strict=True):
        spots, ends = _draw_curve(axes, best, measure, against)
        if len({point.cfg_scale for point in points}) > 1:
            _label_scales(axes, spots)
        if floor is not None and measure is _FRECHET:
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


def guidance_figure(points: Iterable[CurvePoint], title: str = "") -> Figure:
    """What guidance trades: Frechet distance against agreement with the captions (paper, Fig. 7 left).

    One line a budget through its guidance scales, which the spots are labelled with; means over seeds. A panel for each
    measure of agreement; without any, as for models of classes, the scale itself is the axis.

    Args:
        points: Measured points, in any order; at least one.
        title: The message.
    """
    points = list(points)
    lines = _by(points, lambda point: (point.series, point.budget))
    budgets = sorted({budget for _, budget in lines}, reverse=True)
    colours = {budget: _BUDGET_COLOURS[i % len(_BUDGET_COLOURS)] for i, budget in enumerate(budgets)}
    measures = _measured(points) or [_GUIDANCE]
    caption = _caption(points, seeds=" (means)", scales="" if _GUIDANCE in measures else ", written at the spots")
    figure, panels = _figure(title or "What guidance trades, at several budgets", caption, len(measures), key=True)
    for axes, measure in zip(panels, measures, strict=True):
        sweeps = [(_sweep(line, measure), colours[budget], series) for (series, budget), line in lines.items()]
        _draw_sweeps(axes, sweeps, measure)
    costs = {budget: fmean(point.relative_flops for point in points if point.budget == budget) for budget in budgets}
    names = [("FLOPs", _FAINT), *((f"\u25cf {100 * costs[budget]:.3g} %", colours[budget]) for budget in budgets)]
    series = list(dict.fromkeys(name for name, _ in lines))
    named = [(f"   {_LINE_NAMES[_DASHES.get(name, '-')]}: {name}", _FAINT) for name in series]
    _write_key(figure, names + (named if len(series) > 1 else []))
    return figure


def at_best_guidance(points: Iterable[CurvePoint]) -> list[CurvePoint]:
    """Of each series and budget the points at the guidance scale with the lowest Frechet distance, mean over seeds."""
    result = []
    for group in _by(points, lambda point: (point.series, point.budget, point.relative_flops)).values():
        scales = _by(group, lambda point: point.cfg_scale)
        result += min(scales.values(), key=lambda same: fmean(point.frechet for point in same))
    return result


def gap_figure(timesteps: Sequence[int], gap: Mapping[PatchSize, Any]) -> Figure:
    """Difference of weak and powerful predictions over time, one line a weak patch size (paper, Fig. 4 right).

    Args:
        timesteps: Train timesteps, 0 data to 999 noise.
        gap: Values at these timesteps by weak patch size, a tensor or a sequence each.
    """
    caption = "mean squared difference of predictions"
    figure, (axes,) = _figure("Where weak predictions differ from powerful ones", caption)
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


def _figure(title: str, caption: str, num_panels: int = 1, key: bool = False) -> tuple[Figure, list[Any]]:
    """A figure with panels side by side, each with a margin for names of lines, or with room for a key above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 8 if num_panels == 1 else 6.6 * num_panels
    figure = Figure(figsize=(width, 5), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.28 / width, 0.935, title, fontsize=14, fontweight="bold", color=_INK)
    lines = fill(caption, int(15.6 * width), max_lines=3, placeholder=" ...")
    figure.text(0.28 / width, 0.91, lines, fontsize=8.5, color=_FAINT, va="top", linespacing=1.4)
    share = 1 / num_panels
    left, inner, height = 0.72 / width, share - (1.2 if key else 2.16) / width, 0.6 if key else 0.66
    panels = [figure.add_axes((place * share + left, 0.13, inner, height)) for place in range(num_panels)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_RULE)
        axes.tick_params(colors=_FAINT, length=0)
        axes.grid(axis="y", color=_RULE, linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def _draw_curve(
    axes: Any, points: Sequence[CurvePoint], measure: _Measure, against: Against
) -> tuple[list[tuple[_Spot, str]], list[_End]]:
    """The lines of one panel of :func:`curve_figure`: their spots with their colours, and where they end."""
    labelled: list[tuple[_Spot, str]] = []
    ends: list[_End] = []
    for index, (name, series) in enumerate(_by(points, lambda point: point.series).items()):
        colour = _COLOURS.get(name, _OTHER_COLOURS[index % len(_OTHER_COLOURS)])
        spots = _spots(series, measure.field, against)
        labelled += [(spot, colour) for spot in spots]
        ends.append(_draw_series(axes, name, spots, colour))
    axes.invert_xaxis()
    _label_axes(axes, points, measure, against)
    return labelled, ends


def _draw_floor(axes: Any, floor: float) -> _End:
    axes.axhline(floor, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return axes.get_xlim()[1], floor, "real against real", _FAINT  # the right end


def _label_axes(axes: Any, points: Sequence[CurvePoint], measure: _Measure, against: Against) -> None:
    first = points[0]
    if against == "time":
        axes.set_xlabel(f"seconds an image ({first.device}, {first.precision}, batch {first.batch_size})", color=_FAINT)
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:.3g}")
        axes.locator_params(axis="x", nbins=6)
    else:
        axes.set_xlabel("FLOPs of sampling, relative to the powerful patch size at every step", color=_FAINT)
        axes.xaxis.set_major_formatter(_percent)
    _set_measure(axes.yaxis, measure)
    if measure is _FRECHET:
        axes.set_ylim(0, 1.08 * max(point.frechet for point in points) or 1.0)
    else:
        _widen(axes, measure.least_span)


def _widen(axes: Any, least_span: float) -> None:
    """Let the axis span so much at least: noise of a fraction of it is not to look like a trend."""
    low, high = axes.get_ylim()
    missing = max(0.0, least_span - (high - low))
    axes.set_ylim(low - missing / 2, high + missing / 2)


def _set_measure(axis: Any, measure: _Measure) -> None:
    axis.set_label_text(measure.label, color=_FAINT)
    if measure.is_share:
        axis.set_major_formatter(_percent)


def _percent(value: float, position: int) -> str:
    return f"{100 * value:.4g} %"


def _draw_series(axes: Any, name: str, spots: Sequence[_Spot], colour: str) -> _End:
    """Line, points and range over seeds; returns where its label goes, the end of least cost."""
    x, y, low, high, _ = zip(*spots, strict=True)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    front = 4 if name == "weak first" else 3
    axes.plot(x, y, color=colour, linewidth=2.4 if front == 4 else 1.6, marker="o", markersize=5, zorder=front)
    return (x[0], y[0], name, colour)


def _sweep(points: Sequence[CurvePoint], measure: _Measure) -> list[_Spot]:
    """Means over seeds, from the weakest to the strongest guidance: x by the measure, y the Frechet distance."""
    scales = _by(sorted(points, key=lambda point: point.cfg_scale), lambda point: point.cfg_scale)
    return [_spot(same, fmean(getattr(point, measure.field) for point in same), "frechet") for same in scales.values()]


def _draw_sweeps(axes: Any, sweeps: Sequence[tuple[list[_Spot], str, str]], measure: _Measure) -> None:
    """One panel of :func:`guidance_figure`; the full budget in front."""
    for place, (spots, colour, series) in enumerate(sweeps):
        x, y = [spot.x for spot in spots], [spot.mean for spot in spots]
        style = {"linestyle": _DASHES.get(series, "-"), "linewidth": 2, "marker": "o", "markersize": 4.5}
        axes.plot(x, y, color=colour, zorder=4 - place / len(sweeps), **style)
    _set_measure(axes.xaxis, measure)
    _set_measure(axes.yaxis, _FRECHET)
    axes.margins(0.09)
    if measure is not _GUIDANCE:
        _label_scales(
            axes, [labelled for place, sweep in enumerate(sweeps) for labelled in _labelled(*sweep[:2], place)]
        )


def _labelled(spots: Sequence[_Spot], colour: str, place: int) -> list[tuple[_Spot, str]]:
    """Which spots of a line say their scale: of a long line that is not the first, its ends."""
    chosen = spots if place == 0 or len(spots) <= _FEW else (spots[0], spots[-1])
    return [(spot, colour) for spot in chosen]


def _label_scales(axes: Any, spots: Sequence[tuple[_Spot, str]]) -> None:
    """Write the guidance scale beside each spot, but for those that would run into a spot or an earlier label."""
    from matplotlib.patheffects import withStroke

    axes.get_xlim(), axes.get_ylim()  # settles the limits, which the places on the page follow from
    everywhere = [place for line in axes.get_lines() for place in _on_page(axes, line.get_xydata())]
    taken: list[tuple[float, float]] = []
    for (spot, colour), (x, y) in zip(spots, _on_page(axes, [spot[:2] for spot, _ in spots]), strict=True):
        free = [(dx, dy) for dx, dy in _AROUND if _is_free(x + dx, y + dy, taken, everywhere)]
        if free:
            taken.append((x + free[0][0], y + free[0][1]))
            style = {"color": colour, "fontsize": 7.5, "ha": "center", "va": "center", "zorder": 5}
            halo = [withStroke(linewidth=2, foreground="white")]
            place = {"textcoords": "offset points", "path_effects": halo}
            axes.annotate(f"{spot.cfg_scale:g}", (spot.x, spot.mean), free[0], **place, **style)


def _on_page(axes: Any, places: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Data coordinates in points, 72 an inch."""
    return [(x, y) for x, y in axes.transData.transform(places) * 72 / axes.figure.dpi] if len(places) else []


_AROUND = ((0, 9), (0, -9), (13, 0), (-13, 0))
"""Places of a label beside its spot, in points, the preferred one first."""


def _is_free(x: float, y: float, labels: Iterable[tuple[float, float]], spots: Iterable[tuple[float, float]]) -> bool:
    """Whether a label has room around a place, in points."""
    over_label = any(abs(x - other) < 18 and abs(y - height) < 9 for other, height in labels)
    return not over_label and all(abs(x - other) > 10 or abs(y - height) > 6 for other, height in spots)


def _write_key(figure: Figure, names: Sequence[tuple[str, str]]) -> None:
    """A row of names in the colours of their lines, above the panels."""
    x = 0.72 / figure.get_figwidth()
    for text, colour in names:
        shown = figure.text(x, 0.775, text, color=colour, fontsize=10, va="center")
        x += (shown.get_window_extent().width / figure.dpi + 0.16) / figure.get_figwidth()


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


def _measured(points: Iterable[CurvePoint]) -> list[_Measure]:
    """The measures of agreement with captions that all points have."""
    points = list(points)
    return [m for m in _ALIGNMENTS if all(getattr(point, m.field) is not None for point in points)]


def _by(points: Iterable[CurvePoint], key: Callable[[CurvePoint], Key]) -> dict[Key, list[CurvePoint]]:
    groups: dict[Key, list[CurvePoint]] = defaultdict(list)
    for point in points:
        groups[key(point)].append(point)
    return groups


def _spots(points: Iterable[CurvePoint], field: str, against: Against) -> list[_Spot]:
    """Means and ranges over seeds, by rising cost."""
    groups = _by(points, lambda point: (point.relative_flops, point.budget, point.cfg_scale)).values()
    cost = "relative_flops" if against == "FLOPs" else "seconds_per_image"
    return sorted(_spot(group, fmean(getattr(point, cost) for point in group), field) for group in groups)


def _spot(points: Sequence[CurvePoint], x: float, field: str) -> _Spot:
    values = [getattr(point, field) for point in points]
    return _Spot(x, fmean(values), min(values), max(values), points[0].cfg_scale)


def _caption(points: Sequence[CurvePoint], seeds: str, scales: str) -> str:
    """Who measured what: without it the numbers compare with nothing.

    Args:
        points: What is shown.
        seeds: What is shown of several seeds.
        scales: What the reader is to know where there are several guidance scales.
    """
    first, num_seeds = points[0], len({point.seed for point in points})
    guidance = sorted({point.cfg_scale for point in points})
    over = f"{num_seeds} seeds{seeds}" if num_seeds > 1 else f"seed {first.seed}"
    scale = f"{guidance[0]:g}" if len(guidance) == 1 else f"{guidance[0]:g} to {guidance[-1]:g}{scales}"
    asked = "".join(f"; {part}" for part in (first.conditions, first.judges) if part)
    return (
        f"{first.evaluator}; reference: {first.reference}{asked}; {first.num_samples:,} samples a point, {over}; "
        f"{first.solver}, {max(point.num_sampling_steps for point in points)} steps at 100\u00a0%; "
        f"guidance {scale}; {first.codec}"
    )
