"""What guidance trades: a line a budget through its scales, each of them named."""

from dataclasses import replace

from flexidit.guidance_plot import guidance_figure
from flexidit.metrics.curve_points import CurvePoint


def texts(figure: object) -> str:
    (axes,) = figure.axes  # type: ignore[attr-defined]
    return " ".join(text.get_text() for text in [*figure.texts, *axes.texts])  # type: ignore[attr-defined]


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
