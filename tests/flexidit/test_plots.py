"""The figure shows every mean where it was measured, names every line, and says who measured."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from flexidit.metrics.curve_points import CurvePoint
from flexidit.patch_size import PatchSize
from flexidit.plots import curve_figure, gap_figure, plot_curve


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
