"""``flexidit curve`` of models of clips: a line for each weak mode, mixtures beside them, and it continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flexidit import create_model, flexify
from flexidit.cli import main
from flexidit.config import config_to_dict
from flexidit.metrics import moving_digits
from flexidit.metrics.curve import Evaluation
from flexidit.metrics.curve_candidates import Candidate
from flexidit.metrics.curve_points import CurvePoint, read_csv
from flexidit.metrics.digit_classifier import train_digit_classifier
from flexidit.text import WordEncoder

WORDS = WordEncoder(width=64, max_length=16, seed=3)
LINE = ["--reference", "digits", "--prompt-file", "digits", "--num-samples", "6", "--steps", "4", "--cfg-scale", "2"]
MODES = ["--budgets", "1.0,0.7,0.3", "--weak", "1x4x4,2x2x2"]
MIXTURES = ["--schedules", "1x4x4:1,2x2x2:1,1x2x2:2;2x2x2:1,1x4x4:1,1x2x2:2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def quickly(x: torch.Tensor, y: torch.Tensor, seed: int, num_epochs: int, **options: int) -> nn.Module:
        return train_digit_classifier(x, y, seed, num_epochs=1, **options)

    monkeypatch.setattr(moving_digits, "train_digit_classifier", quickly)


@pytest.fixture
def path(randomised: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """A training checkpoint of a random model of clips of 4 frames of 12x12, with two weak modes."""
    options = {"input_size": (4, 12, 12), "depth": 1, "hidden_size": 32}
    student = flexify(randomised(create_model("VideoDiT-Tiny", **options)), ["1x4x4", "2x2x2"], "lora", rank=2)
    randomised(student, seed=1)
    state = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    said = {"config": config_to_dict(student.config), "base": None, "text": WORDS.fingerprint}
    torch.save({"state_dict": state, "flexidit": said}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Schedules that are measured."""
    calls: list[str] = []
    measure = Evaluation.measure

    def counted(self: Evaluation, candidate: Candidate) -> CurvePoint:
        calls.append(str(candidate.schedule))
        return measure(self, candidate)

    monkeypatch.setattr(Evaluation, "measure", counted)
    return calls


def curve(path: Path, out: Path, *options: str) -> list[CurvePoint]:
    assert main(["curve", str(path), *LINE, "--device", "cpu", "--out", str(out), *options]) == 0
    return read_csv(out / "curve.csv")


def test_modes_and_mixtures(path: Path, measured: list[str], tmp_path: Path, capsys: Any) -> None:
    points = curve(path, tmp_path / "out", *MODES, *MIXTURES)
    lines = {name: [p for p in points if p.series == name] for name in dict.fromkeys(p.series for p in points)}
    assert list(lines) == ["weak first 1x4x4", "weak first 2x2x2", "mixture"]
    assert [p.budget for p in lines["weak first 1x4x4"]] == [1.0, 0.7, 0.3]
    assert [p.budget for p in lines["weak first 2x2x2"]] == [1.0, 0.7]
    assert [p.schedule for p in lines["mixture"]] == MIXTURES[1].split(";")
    assert len(measured) == len(set(measured)) == 6  # the full budget once
    assert len({p.frechet for p in points}) == 6
    for point in points:
        assert point.sample == "clip" and None not in (point.frechet_frames, point.agreement)
        assert point.flicker is not None and 0 < point.flicker < 1 and point.smoothness is not None
    printed = capsys.readouterr().out
    assert "Patch size 2x2x2 does not reach 0.3." in printed and "seconds a clip" in printed
    page = (tmp_path / "out" / "curve.html").read_text().replace("data:image/png;", "")
    assert "image" not in printed and "image" not in page and "Frechet distance of frames" in page


def test_mixtures_can_be_added_to_a_curve_that_is_there(path: Path, measured: list[str], tmp_path: Path) -> None:
    first = curve(path, tmp_path / "out", *MODES)
    both = curve(path, tmp_path / "out", *MODES, *MIXTURES)
    assert both[: len(first)] == first and len(measured) == len(first) - 1 + 2
    settings = json.loads((tmp_path / "out" / "curve.json").read_text())["settings"]
    assert settings["weak"] == "1x4x4,2x2x2" and "per frame" not in settings["reference"]


def test_one_mode_is_called_as_ever(path: Path, tmp_path: Path) -> None:
    points = curve(path, tmp_path / "out", "--budgets", "1.0,0.7", "--weak", "2x2x2")
    assert [(p.series, p.schedule) for p in points] == [
        ("weak first", "1x2x2:4"),
        ("weak first", "2x2x2:2,1x2x2:2"),
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--budgets 0.1 --weak 1x4x4,2x2x2", "out of reach"),
        ("--weak 1x4x4,1x4x4", "has 1x4x4 twice"),
        ("--schedules 1x4x4:2;1x4x4:2", "has 1x4x4:2 twice"),
        ("--schedules 1x4x4", "is not a schedule"),
        ("--schedules 2x4x4:2,1x2x2:2 --budgets 1.0", "but the model has 1x2x2"),
    ],
)
def test_refusals(path: Path, options: str, sentence: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["curve", str(path), *LINE, "--device", "cpu", "--out", str(tmp_path / "out"), *options.split()]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
