"""The quick start at toy size: whole, repeatable, interruptible."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexidit import load_checkpoint
from flexidit.cli import main
from flexidit.commands.quickstart import tell
from flexidit.commands.quickstart.evaluation import with_shared_ends
from flexidit.commands.quickstart.judge import image_judge
from flexidit.commands.quickstart.schedules import SPATIAL, TEMPORAL, clip_schedules, image_schedules
from flexidit.commands.quickstart.settings import (
    SETTINGS,
    ClassConditionalSettings,
    QuickstartSettings,
    TextToImageSettings,
    TextToVideoSettings,
    claim_folder,
)
from flexidit.flops import schedule_cost
from flexidit.metrics.curve import Evaluation
from flexidit.metrics.curve_candidates import MIXTURE, Candidate
from flexidit.metrics.curve_points import CurvePoint, read_csv
from flexidit.models import FlexiTransformer
from flexidit.recipes import flexify
from flexidit.variants import create_model

TINY = {
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "pretraining_steps": 4,
    "num_sampling_steps": 5,
    "num_samples": 12,
    "num_seeds": 2,
    "weak_steps": (0, 2, 5),
    "compared_weak_steps": (2,),
}
TOY = ClassConditionalSettings(**TINY, fine_tuning_steps=4, mmd_start_step=1, mmd_every_n_steps=1)  # type: ignore[arg-type]
TOYS: dict[str, QuickstartSettings] = {
    "class-conditional": TOY,
    "text-to-image": TextToImageSettings(**TINY, distillation_steps=4, rank=2),  # type: ignore[arg-type]
    "text-to-video": TextToVideoSettings(
        **TINY,  # type: ignore[arg-type]
        image_steps=4,
        distillation_steps=4,
        rank=2,
        mixtures=("1x6x6:2,2x4x4:1,1x4x4:2",),
        sampling_batch_size=6,
    ),
}

WRITTEN = {
    "checkpoints",
    "config.yaml",
    "curve.csv",
    "curve.png",
    "report.html",
    "samples.png",
    "student.safetensors",
    "target.safetensors",
    "tensorboard",
}


def numbers(points: list[CurvePoint]) -> list[CurvePoint]:
    """Without the time, which is never the same twice."""
    return [replace(point, seconds_per_image=0.0) for point in points]


def story(tmp_path_factory: pytest.TempPathFactory, recipe: str) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    claim_folder(out, TOYS[recipe])
    tell(TOYS[recipe], out, quiet=True)
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story(tmp_path_factory, "class-conditional")


@pytest.fixture(scope="module")
def with_captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story(tmp_path_factory, "text-to-image")


@pytest.fixture(scope="module")
def with_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story(tmp_path_factory, "text-to-video")


@pytest.fixture(params=["finished", "with_captions"])
def either(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_it_leaves_everything_that_it_promises(either: Path) -> None:
    assert {path.name for path in either.iterdir()} == WRITTEN
    assert len(read_csv(either / "curve.csv")) == 2 * (3 + 1 + 1)
    assert list((either / "tensorboard").rglob("events.*"))


def test_the_page_is_self_contained(either: Path) -> None:
    page = (either / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_captions_are_judged(with_captions: Path) -> None:
    points = read_csv(with_captions / "curve.csv")
    assert all(point.agreement is not None and 0 <= point.agreement <= 1 for point in points)
    assert "<th>text</th>" in (with_captions / "report.html").read_text()


def test_the_distilled_student_still_is_its_target(with_captions: Path) -> None:
    target, student = (load_checkpoint(with_captions / f"{name}.safetensors") for name in ("target", "student"))
    names = {name: name.replace(".base_layer.", ".") for name in student.state_dict()}
    base = {names[name]: tensor for name, tensor in student.state_dict().items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in target.state_dict().items())
    assert "the same to the last bit" in (with_captions / "report.html").read_text()
    assert (with_captions / "checkpoints" / "distillation" / "last.ckpt").stat().st_size < 1e6


def test_clips_are_told_of_with_both_modes(with_clips: Path) -> None:
    assert {path.name for path in with_clips.iterdir()} == WRITTEN | {"image.safetensors", "samples.gif"}
    points = read_csv(with_clips / "curve.csv")
    assert {point.series for point in points} == {SPATIAL, TEMPORAL, MIXTURE, "weak last", "fewer steps"}
    assert len(points) == 2 * (3 + 3 + 1 + 1 + 1)
    assert all(None not in (p.agreement, p.frechet_frames, p.flicker, p.smoothness) for p in points)
    page = (with_clips / "report.html").read_text()
    assert "data:image/gif;base64," in page and "the same to the last bit" in page


def test_the_clips_student_has_its_target_and_an_adapter_for_each_mode(with_clips: Path) -> None:
    target, student = (load_checkpoint(with_clips / f"{name}.safetensors") for name in ("target", "student"))
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in student.state_dict().items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in target.state_dict().items())
    assert [size.name for size in student.patch_sizes] == ["1x4x4", "2x4x4", "1x6x6"]


def test_mixtures_use_every_step_of_the_full_budget() -> None:
    settings = TextToVideoSettings()
    target = create_model("VideoDiT-Tiny", **settings.variant_overrides())
    model = flexify(target, [settings.temporal_patch_size, settings.weak_patch_size], "lora", rank=2)
    counts = {len(candidate.schedule) for candidate in clip_schedules(model, settings) if candidate.series == MIXTURE}
    assert counts == {settings.num_sampling_steps}


def test_a_second_run_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    claim_folder(tmp_path / "again", TOY)
    tell(TOY, tmp_path / "again", quiet=True)
    again, first = (numbers(read_csv(folder / "curve.csv")) for folder in (tmp_path / "again", finished))
    assert again == first


def test_interrupted_it_continues_to_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "interrupted"
    claim_folder(out, TOY)
    measure, calls = Evaluation.measure, []

    def stop_at_the_fourth(self: Evaluation, candidate: Candidate) -> CurvePoint:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(candidate)
        return measure(self, candidate)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "measure", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            tell(TOY, out, quiet=True)
    assert len(read_csv(out / "curve.csv")) == 3
    weights = (out / "student.safetensors").stat().st_mtime_ns
    tell(TOY, out, quiet=True)
    assert (out / "student.safetensors").stat().st_mtime_ns == weights
    assert numbers(read_csv(out / "curve.csv")) == numbers(read_csv(finished / "curve.csv"))


def test_finished_points_are_not_measured_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluation, "measure", lambda self, candidate: pytest.fail("measured"))
    tell(TOY, finished, quiet=True)


def test_another_runs_folder_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"other settings \(hidden_size 16 there, 8 now\)"):
        claim_folder(finished, replace(TOY, hidden_size=8))
    assert main(["quickstart", "--out", str(finished), "--seed", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_json_is_all_that_standard_output_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SETTINGS, "class-conditional", lambda seed: replace(TOY, num_seeds=1, seed=seed))  # type: ignore[arg-type]
    assert main(["quickstart", "--out", str(tmp_path / "run"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["series"] for row in rows] == ["weak first"] * 3 + ["weak last", "fewer steps"]


@pytest.fixture(scope="module")
def student() -> FlexiTransformer:
    settings = ClassConditionalSettings()
    return flexify(create_model("DiT-Tiny/2", **settings.variant_overrides()), [settings.weak_patch_size])


def test_ways_to_save_are_compared_at_equal_cost(student: FlexiTransformer) -> None:
    settings = ClassConditionalSettings()
    by_series: dict[str, dict[float, float]] = {"weak first": {}, "weak last": {}, "fewer steps": {}}
    for candidate in image_schedules(student, settings):
        by_series[candidate.series][candidate.budget] = schedule_cost(student, candidate.schedule).total
    for budget, cost in by_series["weak last"].items():
        assert cost == by_series["weak first"][budget]
        assert by_series["fewer steps"][budget] == pytest.approx(cost, rel=0.02)


def test_lines_of_the_plot_begin_and_end_together(finished: Path) -> None:
    points = with_shared_ends(read_csv(finished / "curve.csv"))
    full = [point.series for point in points if point.relative_flops == 1.0 and point.seed == 0]
    assert sorted(full) == ["fewer steps", "weak first", "weak last"]


def test_real_digits_are_close_to_real_digits() -> None:
    few, many = (image_judge(replace(TOY, num_samples=count)) for count in (100, 1000))
    assert 0.0 < many.floor < few.floor < 0.5
