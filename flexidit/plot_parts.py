"""What figures of measured points have in common: panels, measures on axes, spots, labels beside them, captions.

Drawn on matplotlib's ``Figure`` without pyplot: no display, no global state, safe in any thread.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from flexidit.metrics.curve_candidates import MIXTURE
from flexidit.metrics.curve_points import CurvePoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = TypeVar("Key")

INK, FAINT, RULE = "#20242c", "#707680", "#d9dce1"
COLOURS = {"weak first": "#1f6fd6", "fewer steps": "#5f6b7a", "weak last": "#e07b1a"}
OTHER_COLOURS = ("#2a9d5c", "#a04bbf", "#c23b4e", "#1aa6b7", "#8a6d1f", "#d46aa0")
"""Of series of other names."""


class Measure(NamedTuple):
    """A field of :class:`CurvePoint` on an axis."""

    field: str
    label: str
    is_share: bool = False
    least_span: float = 0.0
    """Of its axis, where the axis does not begin at zero."""


FRECHET = Measure("frechet", "Fr\u00e9chet distance (lower is better)")
ALIGNMENTS = (
    Measure("agreement", "caption agreement (higher is better)", is_share=True, least_span=0.1),
    Measure("clip_score", "CLIP score (higher is better)", least_span=2.0),
)
_OF_CLIPS = (
    Measure("frechet_frames", "Fr\u00e9chet distance of frames (lower is better)"),
    Measure("flicker", "temporal flicker (1 is none)", least_span=0.02),
    Measure("smoothness", "motion smoothness (1 is smoothest)", least_span=0.02),
)


class Spot(NamedTuple):
    """Measurements that differ in their seed only."""

    x: float
    mean: float
    low: float
    high: float
    cfg_scale: float


def new_figure(title: str, caption: str, num_panels: int = 1, key: bool = False) -> tuple[Figure, list[Any]]:
    """A figure with panels in rows of three at most, each with a margin for names of lines, or with a key above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_columns, num_rows = _arrangement(num_panels)
    width, height = 8 if num_panels == 1 else 6.6 * num_columns, 5 + _PITCH * (num_rows - 1)
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.28 / width, 1 - 0.325 / height, title, fontsize=14, fontweight="bold", color=INK)
    lines = fill(caption, int(15.6 * width), max_lines=3, placeholder=" ...")
    figure.text(0.28 / width, 1 - 0.45 / height, lines, fontsize=8.5, color=FAINT, va="top", linespacing=1.4)
    inner, tall = width / num_columns - (1.2 if key else 2.16), 3.0 if key else 3.3
    corners = [
        (place % num_columns * width / num_columns + 0.72, 0.65 + _PITCH * (num_rows - 1 - place // num_columns))
        for place in range(num_panels)
    ]
    panels = [figure.add_axes((x / width, y / height, inner / width, tall / height)) for x, y in corners]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        axes.tick_params(colors=FAINT, length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels


_PITCH = 4.2  # inches from one row of panels to the next


def _arrangement(num_panels: int) -> tuple[int, int]:
    """Columns and rows: four are two by two, five and six two rows of three."""
    num_rows = math.ceil(num_panels / 3)
    return math.ceil(num_panels / num_rows), num_rows


def set_measure(axis: Any, measure: Measure) -> None:
    """Name an axis, and write shares as percent."""
    axis.set_label_text(measure.label, color=FAINT)
    if measure.is_share:
        axis.set_major_formatter(percent)


def percent(value: float, position: int) -> str:
    """A formatter of ticks."""
    return f"{100 * value:.4g} %"


def label_scales(axes: Any, spots: Sequence[tuple[Spot, str]]) -> None:
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


def measured(points: Iterable[CurvePoint], among: Sequence[Measure] = (*ALIGNMENTS, *_OF_CLIPS)) -> list[Measure]:
    """The measures, beside the Frechet distance, that all points have."""
    points = list(points)
    return [measure for measure in among if all(getattr(point, measure.field) is not None for point in points)]


def group_by(points: Iterable[CurvePoint], key: Callable[[CurvePoint], Key]) -> dict[Key, list[CurvePoint]]:
    """Points by what they have in common, in their order."""
    groups: dict[Key, list[CurvePoint]] = defaultdict(list)
    for point in points:
        groups[key(point)].append(point)
    return groups


def spot_of(points: Sequence[CurvePoint], x: float, field: str) -> Spot:
    """Points that differ in their seed, as one spot of a field of theirs."""
    values = [getattr(point, field) for point in points]
    return Spot(x, fmean(values), min(values), max(values), points[0].cfg_scale)


def caption_of(points: Sequence[CurvePoint], seeds: str, scales: str) -> str:
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
        f"{first.solver}, {_full_steps(points)} steps at 100\u00a0%; "
        f"guidance {scale}; {first.codec}"
    )


def _full_steps(points: Sequence[CurvePoint]) -> int:
    """Of the full budget; mixtures may have other numbers."""
    lines = [point for point in points if point.series != MIXTURE]
    return max(point.num_sampling_steps for point in lines or points)
