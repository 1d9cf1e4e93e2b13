from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flexidit.commands.curve_report import table_headings, table_rows, write_report
from flexidit.metrics.curve_points import CurvePoint


def point(
    budget: float, frechet: float, seed: int, accuracy: float | None = None, series: str = "weak first"
) -> CurvePoint:
    return CurvePoint(
        series=series,
        budget=budget,
        relative_flops=budget - 0.004,
        flops_per_image=2_500_000_000,
        frechet=frechet,
        accuracy=accuracy,
        seconds_per_image=0.5 * budget + 0.01 * seed,
        schedule="1x2x2:4",
        num_sampling_steps=4,
        num_samples=20,
        evaluator="an <evaluator>",
        fingerprint="f",
        reference="some images",
        model="m",
        codec="PixelCodec",
        solver="ddpm",
        cfg_scale=1.5,
        guidance_channels=None,
        precision="float32",
        seed=seed,
        batch_size=8,
        device="cpu",
    )


POINTS = [point(1.0, 2.0, 0, 0.9), point(0.6, 3.0, 0), point(1.0, 4.0, 1, 0.7), point(0.6, 3.5, 0, series="weak last")]


def test_rows_are_means_over_seeds() -> None:
    rows = list(table_rows(POINTS))
    assert rows[0] == ("weak first", "1", "99.6%", "2.50", "0.505", "3.000 (2.000 to 4.000)", "80.0%", "2")
    assert rows[1][5:] == ("3.000", "-", "1") and rows[2][0] == "weak last"


def test_columns_are_those_that_are_known_or_differ() -> None:
    assert table_headings(POINTS)[-3:] == ("Frechet distance", "accuracy", "seeds")
    assert "accuracy" not in table_headings(POINTS[1:2]) and "guidance" not in table_headings(POINTS)
    texts = [replace(POINTS[0], agreement=0.875, clip_score=25.1), replace(POINTS[0], cfg_scale=3.0, agreement=0.5)]
    rows = [dict(zip(table_headings(texts), row, strict=True)) for row in table_rows(texts)]
    assert [row["guidance"] for row in rows] == ["1.5", "3"]
    assert [row["agreement"] for row in rows] == ["87.5%", "50.0%"]
    assert [row["CLIP score"] for row in rows] == ["25.10", "-"]
    clips = [replace(POINTS[0], frechet_frames=0.5, flicker=0.9, smoothness=0.95)]
    row = dict(zip(table_headings(clips), next(table_rows(clips)), strict=True))
    assert (row["Frechet distance of frames"], row["flicker"], row["smoothness"]) == ("0.500", "0.9000", "0.9500")


def test_a_sweep_has_a_figure_of_its_own(tmp_path: Path) -> None:
    settings = {"settings": {}, "floor": None, "notes": ["what is <counted>"]}
    assert write_report(tmp_path, settings, POINTS) == ["curve.png", "latency.png", "curve.html"]
    swept = [*POINTS, replace(POINTS[0], cfg_scale=4.0)]
    assert write_report(tmp_path, settings, swept) == ["curve.png", "latency.png", "guidance.png", "curve.html"]
    page = (tmp_path / "curve.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "what is &lt;counted&gt;" in page


@pytest.mark.parametrize("floor", [None, 1.3])
def test_the_page_holds_everything(floor: float | None, tmp_path: Path) -> None:
    settings = {"device": "cpu", "precision": "float32", "batch_size": 8, "reference": "<some> images"}
    write_report(tmp_path, {"settings": settings, "floor": floor}, POINTS)
    page = (tmp_path / "curve.html").read_text()
    assert "&lt;some&gt; images" in page and "<some>" not in page
    assert ("against the reference: 1.300" in page) == (floor is not None)
    assert all(f"<td>{cell}</td>" in page for row in table_rows(POINTS) for cell in row)
    assert Image.open(tmp_path / "curve.png").size == Image.open(tmp_path / "latency.png").size
    assert (tmp_path / "curve.png").read_bytes() != (tmp_path / "latency.png").read_bytes()
