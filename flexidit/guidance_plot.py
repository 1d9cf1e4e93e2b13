"""What guidance trades at several budgets: the Frechet distance against agreement with the captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flexidit.metrics.curve_points import CurvePoint
from flexidit.plot_parts import (
    ALIGNMENTS,
    FAINT,
    FRECHET,
    INK,
    Measure,
    Spot,
    caption_of,
    group_by,
    label_scales,
    measured,
    new_figure,
    set_measure,
    spot_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (INK, "#1f6fd6", "#12a5a0", "#7aa51c", "#e39a12", "#d5502f", "#a04bbf")
"""From all compute to little; after these they repeat."""
_FEW = 6
"""Spots of a line that can all be labelled."""
_DASHES = {"weak first": "-", "weak last": "--", "fewer steps": ":"}
_LINE_NAMES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dash-dotted"}
_GUIDANCE = Measure("cfg_scale", "guidance scale")


def guidance_figure(points: Iterable[CurvePoint], title: str = "") -> Figure:
    """What guidance trades: Frechet distance against agreement with the captions (paper, Fig. 7 left).

    One line a budget through its guidance scales, which the spots are labelled with; means over seeds. A panel for each
    measure of agreement; without any, as for models of classes, the scale itself is the axis.

    Args:
        points: Measured points, in any order; at least one.
        title: The message.
    """
    points = list(points)
    lines = group_by(points, lambda point: (point.series, point.budget, point.schedule))
    budgets = sorted({budget for _, budget, _ in lines}, reverse=True)
    colours = {budget: _COLOURS[i % len(_COLOURS)] for i, budget in enumerate(budgets)}
    measures = measured(points, ALIGNMENTS) or [_GUIDANCE]
    caption = caption_of(points, seeds=" (means)", scales="" if _GUIDANCE in measures else ", written at the spots")
    figure, panels = new_figure(title or "What guidance trades, at several budgets", caption, len(measures), key=True)
    dashes = _dashes_of([series for series, _, _ in lines])
    for axes, measure in zip(panels, measures, strict=True):
        sweeps = [(_sweep(line, measure), colours[budget], dashes[name]) for (name, budget, _), line in lines.items()]
        _draw_sweeps(axes, sweeps, measure)
    costs = {budget: fmean(point.relative_flops for point in points if point.budget == budget) for budget in budgets}
    names = [("FLOPs", FAINT), *((f"\u25cf {100 * costs[budget]:.3g} %", colours[budget]) for budget in budgets)]
    named = [(f"   {_LINE_NAMES[dash]}: {name}", FAINT) for name, dash in dashes.items()]
    _write_key(figure, names + (named if len(dashes) > 1 else []))
    return figure


def _dashes_of(series: Iterable[str]) -> dict[str, str]:
    """How the lines of each series are drawn: those of no fixed style take what the others leave."""
    names = list(dict.fromkeys(series))
    left = [dash for dash in _LINE_NAMES if dash not in map(_DASHES.get, names)] or list(_LINE_NAMES)
    others = dict(zip((name for name in names if name not in _DASHES), cycle(left)))
    return {name: _DASHES.get(name) or others[name] for name in names}


def _sweep(points: Sequence[CurvePoint], measure: Measure) -> list[Spot]:
    """Means over seeds, from the weakest to the strongest guidance: x by the measure, y the Frechet distance."""
    scales = group_by(sorted(points, key=lambda point: point.cfg_scale), lambda point: point.cfg_scale)
    places = [(fmean(getattr(point, measure.field) for point in same), same) for same in scales.values()]
    return [spot_of(same, x, "frechet") for x, same in places]


def _draw_sweeps(axes: Any, sweeps: Sequence[tuple[list[Spot], str, str]], measure: Measure) -> None:
    """One panel of :func:`guidance_figure`; the full budget in front."""
    for place, (spots, colour, dash) in enumerate(sweeps):
        x, y = [spot.x for spot in spots], [spot.mean for spot in spots]
        style = {"linestyle": dash, "linewidth": 2, "marker": "o", "markersize": 4.5}
        axes.plot(x, y, color=colour, zorder=4 - place / len(sweeps), **style)
    set_measure(axes.xaxis, measure)
    set_measure(axes.yaxis, FRECHET)
    axes.margins(0.09)
    if measure is not _GUIDANCE:
        label_scales(
            axes, [labelled for place, sweep in enumerate(sweeps) for labelled in _labelled(*sweep[:2], place)]
        )


def _labelled(spots: Sequence[Spot], colour: str, place: int) -> list[tuple[Spot, str]]:
    """Which spots of a line say their scale: of a long line that is not the first, its ends."""
    chosen = spots if place == 0 or len(spots) <= _FEW else (spots[0], spots[-1])
    return [(spot, colour) for spot in chosen]


def _write_key(figure: Figure, names: Sequence[tuple[str, str]]) -> None:
    """A row of names in the colours of their lines, above the panels."""
    x = 0.72 / figure.get_figwidth()
    for text, colour in names:
        shown = figure.text(x, 1 - 1.125 / figure.get_figheight(), text, color=colour, fontsize=10, va="center")
        x += (shown.get_window_extent().width / figure.dpi + 0.16) / figure.get_figwidth()
