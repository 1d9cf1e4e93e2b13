"""Models of captions: what they are asked for, who judges it, and the sweep over guidance scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from flexidit import create_model, flexify, save_checkpoint
from flexidit.cli import main
from flexidit.commands import evaluator as evaluator_module
from flexidit.metrics.curve import Evaluation
from flexidit.metrics.curve_candidates import Candidate
from flexidit.metrics.curve_points import CurvePoint, read_csv
from flexidit.metrics.digit_classifier import train_digit_classifier
from flexidit.metrics.judges import Tally
from flexidit.metrics.prompts import Wanted

LINE = "--reference digits --budgets 1.0,0.7 --num-samples 12 --steps 3 --device cpu --text-encoder words:32x10"


@pytest.fixture(autouse=True)
def _quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "train_digit_classifier", partial(train_digit_classifier, num_epochs=1))


@pytest.fixture
def checkpoint(randomised: Callable[..., nn.Module], tmp_path: Path) -> Callable[..., Path]:
    """A random flexible model of captions on disk."""

    def make(in_channels: int = 1, **config: Any) -> Path:
        options = {"input_size": 8, "in_channels": in_channels, "caption_channels": 32, "caption_length": 10, **config}
        torch.manual_seed(0)  # the null caption is random, and no parameter
        student = flexify(randomised(create_model("TextDiT-Tiny/2", **options)), [4], recipe="lora", rank=2)
        return save_checkpoint(randomised(student, seed=1), tmp_path / "model.safetensors")  # type: ignore[arg-type]

    return make


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Schedule and guidance scale of each point that is measured, not taken from elsewhere."""
    calls: list[tuple[str, float]] = []
    measure = Evaluation.measure

    def counted(self: Evaluation, candidate: Candidate) -> CurvePoint:
        calls.append((str(candidate.schedule), self.settings.cfg_scale))
        return measure(self, candidate)

    monkeypatch.setattr(Evaluation, "measure", counted)
    return calls


def curve(path: Path, out: Path, *options: str) -> list[CurvePoint]:
    assert main(["curve", str(path), *LINE.split(), "--out", str(out), *options]) == 0
    return read_csv(out / "curve.csv")


def refusal(capsys: Any, path: Path, out: Path, *options: str) -> str:
    assert main(["curve", str(path), *LINE.split(), "--out", str(out), *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and not out.exists()
    return str(err)


def test_the_sweep_measures_every_budget_at_every_scale(
    checkpoint: Callable[..., Path], measured: list[tuple[str, float]], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    points = curve(checkpoint(), out, "--prompt-file", "digits", "--cfg-scale", "1,2")
    assert [(point.budget, point.cfg_scale) for point in points] == [(1.0, 1.0), (0.7, 1.0), (1.0, 2.0), (0.7, 2.0)]
    assert points[2].flops_per_image == 2 * points[0].flops_per_image  # unguided steps make one prediction
    for point in points:
        assert point.agreement is not None and point.accuracy is not None and 0 <= point.agreement <= 1
        assert point.conditions.startswith("captions of scikit-learn's digits (12 prompts, ")
        assert (point.judges, point.clip_score) == ("digit attributes", None)
    names = ["curve.csv", "curve.html", "curve.json", "curve.png", "guidance.png", "latency.png"]
    assert sorted(file.name for file in out.iterdir()) == names
    assert Image.open(out / "curve.png").size == (2112, 800)  # a panel for the distance, one for the agreement
    page, printed = (out / "curve.html").read_text(), capsys.readouterr().out
    assert page.count("data:image/png;base64,") == 3
    for text in ("guidance", "agreement", "at every step, as the paper does", "captions of scikit-learn"):
        assert text in page and text in printed
    assert len(measured) == 4


def test_more_scales_continue_a_sweep(
    checkpoint: Callable[..., Path], measured: list[tuple[str, float]], tmp_path: Path
) -> None:
    first = curve(checkpoint(), tmp_path / "out", "--prompt-file", "digits", "--cfg-scale", "2")
    both = curve(
        checkpoint(), tmp_path / "out", "--prompt-file", "digits", "--cfg-scale", "2,3", "--budgets", "0.7,1.0"
    )
    assert both[:2] == first
    assert [scale for _, scale in measured] == [2, 2, 3, 3]


def test_prompts_of_a_file_are_taken_in_turn(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a bold seven\nan upright thin two\n")
    points = curve(checkpoint(), tmp_path / "out", "--prompt-file", str(tmp_path / "prompts.txt"), "--budgets", "0.7")
    assert points[0].conditions.startswith("prompts.txt (2 prompts, ")
    (tmp_path / "prompts.txt").write_text("a bold seven\nan upright thin two\n" * 6)
    in_turn = curve(checkpoint(), tmp_path / "same", "--prompt-file", str(tmp_path / "prompts.txt"), "--budgets", "0.7")
    assert (in_turn[0].frechet, in_turn[0].agreement) == (points[0].frechet, points[0].agreement)


def test_coco_captions_and_a_negative_prompt(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    annotations = [{"image_id": index, "caption": f"a bold {index}"} for index in range(10)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": annotations}))
    options = ("--captions", str(tmp_path / "captions.json"), "--budgets", "1.0", "--cfg-scale", "3")
    (plain,) = curve(checkpoint(), tmp_path / "plain", *options)
    (away,) = curve(checkpoint(), tmp_path / "away", *options, "--negative", "a thin seven")
    assert plain.conditions.startswith("captions.json (10 prompts") and "away from 'a thin seven'" in away.conditions
    assert away.frechet != plain.frechet


def test_weights_without_a_null_caption_are_guided_away_from_the_empty_prompt(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint(null_caption=False)
    (point,) = curve(path, tmp_path / "out", "--prompt-file", "digits", "--budgets", "1.0")
    assert "guided away from ''" in point.conditions


def test_merged_adapters_and_other_orders(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--prompt-file", "digits", "--order", "weak_first,weak_last")
    plain = curve(checkpoint(), tmp_path / "plain", *options)
    merged = curve(checkpoint(), tmp_path / "merged", *options, "--merge")
    assert [point.series for point in merged] == ["weak first"] * 2 + ["weak last"] * 2
    assert merged[1].flops_per_image < plain[1].flops_per_image and merged[0].frechet == plain[0].frechet
    for one, other in zip(plain, merged, strict=True):
        assert other.frechet == pytest.approx(one.frechet, rel=1e-3)


def test_other_prompts_are_not_mixed(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    curve(checkpoint(), tmp_path / "out", "--prompt-file", "digits", "--budgets", "1.0")
    (tmp_path / "prompts.txt").write_text("a bold seven\n")
    arguments = ["curve", str(checkpoint()), *LINE.split(), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--prompt-file", str(tmp_path / "prompts.txt")]) == 2
    assert "prompts=captions of scikit-learn's digits" in capsys.readouterr().err


def test_long_prompts_are_counted(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("a bold seven\n" + "a bold bold bold bold bold bold bold bold bold seven\n")
    curve(checkpoint(), tmp_path / "out", "--prompt-file", str(tmp_path / "prompts.txt"), "--budgets", "1.0")
    assert "1 of 2 prompts are longer than the model reads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "told captions; give --prompt-file FILE"),
        ("--prompt-file nowhere.txt", "no prompts at nowhere.txt"),
        ("--captions nowhere.json", "no captions at nowhere.json"),
        ("--prompt-file digits --text-encoder words:8", "width 8 and the model reads 32"),
        ("--prompt-file digits --text-encoder ./nowhere", "no T5 text encoder at ./nowhere"),
        ("--prompt-file digits --clip ./nowhere", "no CLIP at ./nowhere"),
        ("--prompt-file digits --cfg-scale 2,2", "has 2.0 twice"),
    ],
)
def test_refusals(checkpoint: Callable[..., Path], options: str, sentence: str, tmp_path: Path, capsys: Any) -> None:
    assert sentence in refusal(capsys, checkpoint(), tmp_path / "out", *options.split())


def test_prompts_must_be_digit_captions_where_digits_are_measured(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "prompts.txt").write_text("a green seven\n")
    err = refusal(capsys, checkpoint(), tmp_path / "out", "--prompt-file", str(tmp_path / "prompts.txt"))
    assert "'green' in 'a green seven' is not a word of digit captions" in err


def test_models_of_classes_take_no_prompts(randomised: Callable[..., nn.Module], tmp_path: Path, capsys: Any) -> None:
    model = flexify(randomised(create_model("DiT-Tiny/2", input_size=8, num_classes=10, in_channels=1)), [4])
    path = save_checkpoint(model, tmp_path / "classes.safetensors")
    err = refusal(capsys, path, tmp_path / "out", "--prompt-file", "digits")
    assert "told classes, not captions; leave --prompt-file out" in err


def test_a_clip_judges_beside_the_digits(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brightness:
        """Scores images by themselves, so that no weights are needed."""

        measures = ("clip_score",)

        def __init__(self, source: str) -> None:
            self.description = f"CLIP score ({source})"

        def __call__(self, pixels: torch.Tensor, wanted: Wanted) -> dict[str, Tally]:
            assert len(wanted) == len(pixels)
            return {"clip_score": Tally(pixels.mean(dim=(1, 2, 3)).sum().item(), len(pixels))}

    monkeypatch.setattr("flexidit.metrics.clip.CLIPScore", Brightness)
    options = ("--prompt-file", "digits", "--clip", "some-clip", "--cfg-scale", "1,3", "--batch-size", "5")
    points = curve(checkpoint(), tmp_path / "out", *options)
    assert all(point.clip_score is not None and point.agreement is not None for point in points)
    assert points[0].judges == "digit attributes; CLIP score (some-clip)"
    assert Image.open(tmp_path / "out" / "guidance.png").size == (2112, 800)


def test_points_are_those_of_the_python_interface(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from flexidit import load_checkpoint
    from flexidit.commands.evaluator import make_evaluator
    from flexidit.latents import PixelCodec
    from flexidit.metrics.curve import SamplingSettings
    from flexidit.metrics.curve_candidates import candidates
    from flexidit.metrics.digit_attributes import prompts
    from flexidit.metrics.judges import DigitAgreement
    from flexidit.metrics.prompts import Prompts
    from flexidit.text import WordEncoder

    (point,) = curve(checkpoint(), tmp_path / "out", "--prompt-file", "digits", "--budgets", "0.7", "--batch-size", "5")
    model: Any = load_checkpoint(checkpoint())
    judge = make_evaluator(None, None, "digits", (1, 8, 8), next(model.parameters()).device, 12)
    assert judge.classifier is not None
    evaluation = Evaluation(
        model=model,
        codec=PixelCodec(1),
        features=judge.features,
        reference=judge.reference,
        settings=SamplingSettings(num_samples=12, batch_size=12, cfg_scale=1.5),
        full_steps=3,
        conditions=Prompts.encode(prompts(12), WordEncoder(32, 10), "captions of scikit-learn's digits"),
        judges=[DigitAgreement(judge.classifier)],
    )
    own = evaluation.measure(candidates(model, [0.7], 3)[0])
    same = {"seconds_per_image": 0.0, "batch_size": 0, "model": "", "frechet": 0.0}
    assert replace(own, **same) == replace(point, **same)  # type: ignore[arg-type]
    assert own.frechet == pytest.approx(point.frechet, rel=1e-4)
