"""The figure shows every mean where it was measured, names every line, and says who measured."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from flexidit.metrics.curve_points import CurvePoint
from flexidit.patch_size import PatchSize
from flexidit.plots import at_best_guidance, curve_figure, gap_figure, guidance_figure, plot_curve


@pytest.fixture
def points() -> list[CurvePoint]:
    first = CurvePoint(
        series="weak first", budget=1.0, relative_flops=1.0, flops_per_image=1, frechet=2.0, accuracy=None,
        seconds_per_image=0.1, schedule="1x2x2:5", num_sampling_steps=5, num_samples=500, evaluator="some classifier",
        fingerprint="f", reference="digits (1437 samples)", model="m", codec="PixelCodec", solver="ddpm", cfg_scale=1.5,
        guidance_channels=None, precision="float32", seed=0, batch_size=8, device="cpu",
    )  # fmt: skip
    return [
        first,
        replace(first, seed=1, frechet=4.0),
        replace(first, relative_flops=0.4, frechet=5.0),
        replace(first, series="weak last", relative_flops=0.7, frechet=9.0),
    ]


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


@pytest.fixture
def swept(points: list[CurvePoint]) -> list[CurvePoint]:
    """Two budgets at three guidance scales, of a model of captions; the middle scale is best, but for one seed."""
    values = {1.0: (3.0, 0.7), 2.0: (2.0, 0.8), 4.0: (4.0, 0.9)}
    first = replace(points[0], conditions="some prompts", judges="some judge")
    measured = [
        replace(first, budget=budget, relative_flops=budget, cfg_scale=scale, frechet=frechet / budget, agreement=share)
        for budget in (1.0, 0.5)
        for scale, (frechet, share) in values.items()
    ]
    return [*measured, replace(measured[0], seed=1, frechet=1.5), replace(measured[1], seed=1, frechet=2.0)]


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


def test_the_sweep_has_a_line_a_budget_through_its_scales(swept: list[CurvePoint]) -> None:
    figure = guidance_figure(swept[::-1])  # in any order
    (axes,) = figure.axes
    assert all(line.get_xdata().tolist() == [0.7, 0.8, 0.9] for line in axes.get_lines())
    assert sorted(line.get_ydata().tolist() for line in axes.get_lines()) == [[2.25, 2.0, 4.0], [6.0, 4.0, 8.0]]
    assert {text.get_text() for text in axes.texts} == {"1", "2", "4"}
    shown = texts(figure)
    assert "100 %" in shown and "50 %" in shown and "some prompts; some judge" in shown.replace("\n", " ")


def test_models_of_classes_are_swept_over_the_scale_itself(swept: list[CurvePoint]) -> None:
    (axes,) = guidance_figure([replace(point, agreement=None) for point in swept]).axes
    assert axes.get_lines()[0].get_xdata().tolist() == [1.0, 2.0, 4.0]
    assert axes.get_xlabel() == "guidance scale" and not axes.texts


def test_labels_of_a_crowded_sweep_do_not_overlap(points: list[CurvePoint]) -> None:
    crowd = [
        replace(points[0], budget=budget, cfg_scale=1 + i / 8, frechet=2 + (i % 7) / 20, agreement=0.5 + i / 500)
        for budget in (1.0, 0.5)
        for i in range(20)
    ]
    figure = guidance_figure(crowd)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert 2 < len(boxes) < 24
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_series_of_a_sweep_differ_in_their_dashes(swept: list[CurvePoint]) -> None:
    figure = guidance_figure([*swept, *(replace(point, series="weak last") for point in swept)])
    assert {line.get_linestyle() for line in figure.axes[0].get_lines()} == {"-", "--"}
    assert "solid: weak first" in texts(figure) and "dashed: weak last" in texts(figure)
