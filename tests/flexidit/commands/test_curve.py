from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flexidit import create_model, flexify, save_checkpoint
from flexidit.cli import main
from flexidit.commands import evaluator as evaluator_module
from flexidit.metrics.curve import Evaluation
from flexidit.metrics.curve_candidates import Candidate
from flexidit.metrics.curve_points import CurvePoint, read_csv
from flexidit.metrics.digit_classifier import train_digit_classifier

LINE = "--reference digits --budgets 1.0,0.7 --num-samples 20 --steps 4 --device cpu"


@pytest.fixture(autouse=True)
def _quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "train_digit_classifier", partial(train_digit_classifier, num_epochs=1))


@pytest.fixture
def checkpoint(randomised: Callable[..., nn.Module], tmp_path: Path) -> Callable[..., Path]:
    """A random flexible model on disk."""

    def make(seed: int = 0, in_channels: int = 1, **config: Any) -> Path:
        model = create_model("DiT-Tiny/2", input_size=8, num_classes=10, in_channels=in_channels, **config)
        student = flexify(randomised(model, seed=seed), [4])  # type: ignore[arg-type]
        return save_checkpoint(student, tmp_path / f"model{in_channels}.safetensors")

    return make


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Schedule and seed of each point that is measured, not taken from elsewhere."""
    calls: list[tuple[str, int]] = []
    measure = Evaluation.measure

    def counted(self: Evaluation, candidate: Candidate) -> CurvePoint:
        calls.append((str(candidate.schedule), self.settings.seed))
        return measure(self, candidate)

    monkeypatch.setattr(Evaluation, "measure", counted)
    return calls


def curve(path: Path, out: Path, *options: str) -> list[CurvePoint]:
    assert main(["curve", str(path), *LINE.split(), "--out", str(out), *options]) == 0
    return read_csv(out / "curve.csv")


def results(points: list[CurvePoint]) -> list[CurvePoint]:
    """Points without what a clock measured."""
    return [replace(point, seconds_per_image=0.0) for point in points]


def test_all_files_agree(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    points = curve(checkpoint(), tmp_path / "out", "--seeds", "0,1")
    assert [(point.budget, point.seed) for point in points] == [(1.0, 0), (0.7, 0), (1.0, 1), (0.7, 1)]
    names = ["curve.csv", "curve.html", "curve.json", "curve.png", "latency.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    payload = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [CurvePoint(**point) for point in payload["points"]] == points
    page = (tmp_path / "out" / "curve.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    printed = capsys.readouterr().out
    for text in ("weak first", "Frechet distance", "scikit-learn's digits", "real images against the reference"):
        assert text in printed


def test_an_interrupted_run_continues(
    checkpoint: Callable[..., Path],
    measured: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = results(curve(checkpoint(), tmp_path / "whole"))
    assert len(measured) == 2
    counted = Evaluation.measure
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "measure", lambda self, c: interrupt() if measured[2:] else counted(self, c))
        arguments = ["curve", str(checkpoint()), *LINE.split(), "--out", str(tmp_path / "parts")]
        assert main(arguments) == 130
    assert len(measured) == 3
    assert results(curve(checkpoint(), tmp_path / "parts")) == whole
    assert len(measured) == 4  # only what was missing
    more = curve(checkpoint(), tmp_path / "parts", "--seeds", "0,1")
    assert len(measured) == 6 and results(more[:2]) == whole


def test_the_shift_of_a_flow_is_part_of_the_record(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = checkpoint(process="flow", time_shift=3.0, learn_sigma=False), tmp_path / "out"
    points = curve(path, out)
    assert {point.solver for point in points} == {"unipc (time shift 3)"}
    assert results(curve(path, out, "--time-shift", "3", "--solver", "unipc")) == results(points)
    capsys.readouterr()
    assert main(["curve", str(path), *LINE.split(), "--out", str(out), "--time-shift", "1"]) == 2
    assert "this run has solver=unipc (time shift 1)" in capsys.readouterr().err
    assert results(curve(path, tmp_path / "other", "--time-shift", "1")) != results(points)


def interrupt() -> CurvePoint:
    raise KeyboardInterrupt


def test_orders_that_meet_in_a_schedule_are_sampled_once(
    checkpoint: Callable[..., Path], measured: list[tuple[str, int]], tmp_path: Path
) -> None:
    points = curve(checkpoint(), tmp_path / "out", "--order", "weak_first,weak_last,fewer_steps")
    full = [point for point in points if point.budget == 1.0]
    assert [point.series for point in full] == ["weak first", "weak last", "fewer steps"]
    assert len({replace(point, series="") for point in full}) == 1
    assert len(measured) == len(set(measured)) == 4 < len(points) == 6


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--steps", "5"], "steps=4 and this run has steps=5"),
        (["--num-samples", "30"], "num_samples=20"),
        (["--guidance-channels", "1"], "guidance_channels=None"),
        (["--dtype", "bfloat16"], "precision=float32"),
    ],
)
def test_other_settings_are_not_mixed(
    checkpoint: Callable[..., Path], options: list[str], name: str, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["curve", str(checkpoint()), *LINE.split(), "--budgets", "1.0", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = (tmp_path / "out" / "curve.csv").read_bytes()
    assert main([*arguments, *options]) == 2
    err = capsys.readouterr().err
    assert name in err and err.count("\n") == 1
    assert (tmp_path / "out" / "curve.csv").read_bytes() == before


def test_other_weights_are_not_mixed(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    curve(checkpoint(), tmp_path / "out", "--budgets", "1.0")
    assert main(["curve", str(checkpoint(seed=1)), *LINE.split(), "--out", str(tmp_path / "out")]) == 2
    assert "model=model1.safetensors" in capsys.readouterr().err


def test_json_is_all_that_is_printed(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    curve(checkpoint(), tmp_path, "--budgets", "1.0", "--json")
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "curve.json").read_text())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--budgets 0.1", "out of reach"),
        ("--budgets low", "--budgets 'low' is not a list of numbers"),
        ("--order random", "unknown order 'random'; give one or more of weak_first"),
        ("--solver euler", "solver 'euler' does not fit this model, which predicts noise"),
        ("--num-samples 1", "needs 2 samples or more"),
        ("--reference nowhere --features digits", "no reference at 'nowhere'"),
        ("--features vgg", "unknown features 'vgg'"),
    ],
)
def test_refusals(checkpoint: Callable[..., Path], options: str, sentence: str, tmp_path: Path, capsys: Any) -> None:
    arguments = ["curve", str(checkpoint()), *LINE.split(), "--out", str(tmp_path / "out"), *options.split()]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_latents_need_a_vae(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    assert main(["curve", str(checkpoint(in_channels=4)), *LINE.split(), "--out", str(tmp_path / "out")]) == 2
    assert "give --vae" in capsys.readouterr().err


def test_what_is_not_a_curve_is_left_alone(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "curve.json").write_text("[1]")
    assert main(["curve", str(checkpoint()), *LINE.split(), "--out", str(tmp_path)]) == 2
    assert "not a curve of this command" in capsys.readouterr().err
    assert (tmp_path / "curve.json").read_text() == "[1]"


def test_progress_counts_every_sample(checkpoint: Callable[..., Path]) -> None:
    from flexidit.commands.curve import CountedFeatures

    class Mean:
        name = fingerprint = "mean"

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.mean(dim=(2, 3))

    counts: list[int] = []
    features = CountedFeatures(Mean(), counts.append)
    pixels = torch.randn(5, 1, 8, 8)
    assert torch.equal(features(pixels), Mean()(pixels)) and counts == [5] and features.name == "mean"
