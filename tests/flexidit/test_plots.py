"""The figure shows every mean where it was measured, names every line, and says who measured."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from flexidit.metrics.curve_points import CurvePoint
from flexidit.patch_size import PatchSize
from flexidit.plots import at_best_guidance, curve_figure, gap_figure, plot_curve


def texts(figure: object) -> str:
    (axes,) = figure.axes  # type: ignore[attr-defined]
    return " ".join(text.get_text() for text in [*figure.texts, *axes.texts])  # type: ignore[attr-defined]


def test_lines_go_through_the_means_and_bands_through_the_range(points: list[CurvePoint]) -> None:
    (axes,) = curve_figure(points).axes
    line = axes.get_lines()[0]
    assert line.get_xdata().tolist() == [0.4, 1.0]
    assert line.get_ydata().tolist() == [5.0, 3.0]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, 2.0), (1.0, 4.0)} <= {tuple(vertex) for vertex in band.tolist()}


def test_compute_falls_to_the_right_and_distance_starts_at_zero(points: list[CurvePoint]) -> None:
    (axes,) = curve_figure(points).axes
    left, right = axes.get_xlim()
    assert left > right
    assert axes.get_ylim()[0] == 0


def test_everything_is_named(points: list[CurvePoint]) -> None:
    shown = texts(curve_figure(points, "The message", floor=1.3)).replace("\n", " ")
    lines = ("The message", "weak first", "weak last", "real against real")
    how = (
        "some classifier",
        "digits (1437 samples)",
        "500 samples a point",
        "2 seeds",
        "ddpm, 5 steps",
        "guidance 1.5",
    )
    assert all(part in shown for part in (*lines, *how))


def test_names_in_the_margin_do_not_overlap(points: list[CurvePoint]) -> None:
    ends = [replace(points[0], series=f"series {i}", frechet=2.0 + i / 100, relative_flops=0.4) for i in range(4)]
    (axes,) = curve_figure([points[0], *ends], floor=2.0).axes
    heights = sorted(text.xy[1] for text in axes.texts if text.get_text() != "weak first")
    assert len(heights) == 5
    low, high = axes.get_ylim()
    assert all(b - a >= 0.05 * (high - low) for a, b in pairwise(heights))


def test_written_as_a_picture(points: list[CurvePoint], tmp_path: Path) -> None:
    path = plot_curve(points, tmp_path / "new" / "curve.png", floor=1.3)
    assert Image.open(path).size == (1280, 800)


def test_gap_lines_are_named_by_patch_size() -> None:
    figure = gap_figure((50, 500, 950), {PatchSize.parse(4): [3.0, 2.0, 1.0], PatchSize.parse(8): [4.0, 3.0, 2.0]})
    (axes,) = figure.axes
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[3.0, 2.0, 1.0], [4.0, 3.0, 2.0]]
    assert "patch 1x4x4" in texts(figure) and "patch 1x8x8" in texts(figure)


def test_captions_have_a_panel_for_each_measure(swept: list[CurvePoint]) -> None:
    with_clip = [replace(point, clip_score=25.0) for point in swept]
    assert [len(curve_figure(some).axes) for some in (swept, with_clip)] == [2, 3]
    distance, agreement = curve_figure(swept).axes
    assert agreement.get_lines()[0].get_ydata().tolist() == [0.8, 0.8]
    assert "agreement" in agreement.get_ylabel() and "distance" in distance.get_ylabel()
    low, high = agreement.get_ylim()
    assert high - low >= 0.1  # a flat line looks flat


def test_of_a_sweep_the_best_scale_is_shown_and_named(swept: list[CurvePoint]) -> None:
    best = at_best_guidance(swept)
    assert {(point.budget, point.cfg_scale) for point in best} == {(1.0, 2.0), (0.5, 2.0)}
    axes = curve_figure(swept).axes[0]
    assert axes.get_lines()[0].get_ydata().tolist() == [4.0, 2.0]
    assert [text.get_text() for text in axes.texts].count("2") == 2
    assert not any(text.get_text() == "1.5" for text in curve_figure([best[0]]).axes[0].texts)


def test_time_is_an_axis_too(points: list[CurvePoint]) -> None:
    slow = [replace(point, seconds_per_image=2 * point.relative_flops + 0.1 * point.seed) for point in points]
    (axes,) = curve_figure(slow, against="time").axes
    assert axes.get_lines()[0].get_xdata().tolist() == pytest.approx([0.8, 2.05])
    assert "cpu, float32, batch 8" in axes.get_xlabel()
