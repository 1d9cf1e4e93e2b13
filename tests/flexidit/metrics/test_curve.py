"""Points that do not depend on batches, ranks or interruptions, with the cost of what ran."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from flexidit import create_model, flexify, flops
from flexidit.latents import PixelCodec
from flexidit.metrics import curve
from flexidit.metrics.clip_features import ClipFeatures, FrameFeatures
from flexidit.metrics.clip_motion import motion_smoothness, temporal_flicker
from flexidit.metrics.curve import (
    Evaluation,
    Reference,
    SamplingSettings,
    cost_per_image,
    full_cost_per_image,
    make_sampler,
    reference_of,
    sample_pixels,
)
from flexidit.metrics.curve_candidates import candidates
from flexidit.metrics.curve_points import CurvePoint, read_csv, write_csv
from flexidit.metrics.curve_samples import SampledBatch
from flexidit.metrics.frechet import FeatureStatistics, Gaussian
from flexidit.metrics.judges import ClipMotion, Tally
from flexidit.metrics.prompts import Prompts
from flexidit.sampling.schedule import PatchSchedule
from flexidit.text import WordEncoder

SETTINGS = SamplingSettings(num_samples=7, batch_size=3, cfg_scale=2.0)


class Projection(nn.Module):
    """A fixed random projection to four features, that counts what it is shown."""

    name = "random projection"
    fingerprint = "projection/0"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))
        self.seen = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return pixels.flatten(1) @ self.get_buffer("matrix")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = create_model(
        "DiT-S/2", num_classes=3, input_size=4, depth=1, hidden_size=16, num_heads=2, in_channels=1, learn_sigma=False
    )
    student = flexify(model, patch_sizes=[4])
    for parameter in student.parameters():  # the zero-initialised output would make all schedules equal
        nn.init.normal_(parameter, std=0.2)
    return student


def real_images() -> Iterator[dict[str, Tensor]]:
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for part in x.split(8):
        yield {"x": part, "y": torch.zeros(len(part)).long()}


def make_evaluation(settings: SamplingSettings = SETTINGS, model_name: str = "") -> Evaluation:
    features = Projection()
    reference = reference_of(real_images(), PixelCodec(1), features, "noise")
    return Evaluation(make_model(), PixelCodec(1), features, reference, settings, full_steps=5, model_name=model_name)


def measured(evaluation: Evaluation) -> list[CurvePoint]:
    return list(evaluation.curve(candidates(evaluation.model, [1.0, 0.6], 5)))


def test_the_point_says_what_ran() -> None:
    evaluation = make_evaluation()
    full, saved = measured(evaluation)
    assert full.relative_flops == 1.0 and 0.5 < saved.relative_flops < 0.7
    assert (full.schedule, full.num_sampling_steps, full.num_samples) == ("1x2x2:5", 5, 7)
    assert (full.evaluator, full.reference, full.codec) == ("random projection", "noise (20 samples)", "PixelCodec")
    assert full.frechet > 0 and full.frechet != saved.frechet
    assert full.seconds_per_image > 0 and full.accuracy is None


def test_cost_is_that_of_the_samplers_trace() -> None:
    model = make_model()
    schedule = candidates(model, [0.6], 5)[0].schedule
    for cfg_scale in (1.0, 2.0):
        settings = replace(SETTINGS, cfg_scale=cfg_scale)
        sampler = make_sampler(model, schedule, settings)
        sampler([0, 1])
        assert flops.trace_cost(model, sampler.trace).total == 2 * cost_per_image(model, schedule, settings)


def test_fewer_steps_cost_their_share() -> None:
    model = make_model()
    for candidate in candidates(model, [1.0, 0.6, 0.2], 5, "fewer steps"):
        relative = cost_per_image(model, candidate.schedule, SETTINGS) / full_cost_per_image(model, 5, SETTINGS)
        assert relative == pytest.approx(candidate.budget)
        assert candidate.schedule.sizes == (model.patch_sizes[0],)


def test_weak_last_is_weak_first_reversed() -> None:
    model = make_model()
    first, last = (candidates(model, [0.6], 5, series)[0].schedule for series in ("weak first", "weak last"))
    assert last == PatchSchedule(first.steps[::-1])
    assert first[0].cond > first[4].cond


def test_an_unknown_series_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown series 'best'; give 'weak first'"):
        candidates(make_model(), [1.0], 5, "best")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batches_do_not_matter(batch_size: int) -> None:
    schedule = PatchSchedule.parse("4:2,2:2")
    model = make_model()
    whole = list(sample_pixels(model, PixelCodec(1), schedule, replace(SETTINGS, batch_size=7)))
    parts = list(sample_pixels(model, PixelCodec(1), schedule, replace(SETTINGS, batch_size=batch_size)))
    torch.testing.assert_close(torch.cat([part.pixels for part in parts]), whole[0].pixels)
    assert torch.cat([part.indices for part in parts]).tolist() == list(range(7))


def test_the_seed_decides() -> None:
    one, same, other = (measured(make_evaluation(replace(SETTINGS, seed=seed)))[0].frechet for seed in (0, 0, 1))
    assert one == same != other


def test_the_global_generator_is_not_used() -> None:
    state = torch.get_rng_state()
    model = make_model()
    torch.set_rng_state(state)
    list(sample_pixels(model, PixelCodec(1), PatchSchedule.parse("2:2"), SETTINGS))
    assert torch.equal(torch.get_rng_state(), state)


def test_accuracy_is_that_of_the_classifier() -> None:
    evaluation = make_evaluation()
    right, wrong = torch.eye(3).repeat(3, 1)[:7], torch.eye(3).roll(1, 1).repeat(3, 1)[:7]
    for logits, expected in ((right, 1.0), (wrong, 0.0)):
        remaining = list(logits)
        judge = replace(evaluation, classifier=lambda pixels, r=remaining: torch.stack([r.pop(0) for _ in pixels]))
        assert judge.measure(candidates(evaluation.model, [1.0], 5)[0]).accuracy == expected


def test_an_interrupted_curve_continues(tmp_path: Path) -> None:
    first = make_evaluation(model_name="a")
    points = measured(first)
    write_csv(points[:1], tmp_path / "curve.csv")
    second = make_evaluation(model_name="a")
    second.features.seen = 0
    both = list(second.curve(candidates(second.model, [1.0, 0.6], 5), done=read_csv(tmp_path / "curve.csv")))
    assert second.features.seen == 7  # the second point only
    assert [point.frechet for point in both] == [point.frechet for point in points]
    third = make_evaluation(model_name="b")  # other weights: nothing is done yet
    third.features.seen = 0
    list(third.curve(candidates(third.model, [1.0], 5), done=points))
    assert third.features.seen == 7


def test_lines_that_meet_are_measured_once() -> None:
    evaluation = make_evaluation()
    both = [replace(c, series=name) for name in ("one", "other") for c in candidates(evaluation.model, [1.0, 0.6], 5)]
    evaluation.features.seen = 0
    points = list(evaluation.curve(both))
    assert evaluation.features.seen == 2 * 7 and [point.series for point in points] == ["one"] * 2 + ["other"] * 2
    assert [replace(point, series="one") for point in points[2:]] == points[:2]
    assert {point.sample for point in points} == {"image"}


def test_a_reference_in_other_features_is_refused() -> None:
    evaluation = make_evaluation()
    statistics = replace(evaluation.reference.statistics, fingerprint="inception/1")
    with pytest.raises(ValueError, match="computed with the features inception/1"):
        replace(evaluation, reference=Reference(statistics, "other"))
    replace(evaluation, reference=Reference(replace(statistics, fingerprint=None), "a file of others"))


def test_a_reference_file_says_its_name(tmp_path: Path) -> None:
    make_evaluation().reference.statistics.save(tmp_path / "real.npz")
    assert Reference.load(tmp_path / "real.npz").description == "real.npz (20 samples)"


def test_a_reference_stops_at_its_limit() -> None:
    reference = reference_of(real_images(), PixelCodec(1), Projection(), "noise", max_samples=10)
    assert reference.statistics.count == 10


def make_text_evaluation() -> Evaluation:
    """A random model of captions, judged by how bright its samples are and by how long its prompts."""
    torch.manual_seed(0)
    config = {"input_size": 4, "depth": 1, "hidden_size": 16, "num_heads": 2, "in_channels": 1, "learn_sigma": False}
    student = flexify(create_model("TextDiT-Tiny/2", caption_channels=8, caption_length=6, **config), patch_sizes=[4])
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    prompts = Prompts.encode(["a cat", "", "two big dogs"], WordEncoder(width=8, max_length=6), "animals")
    return replace(make_evaluation(), model=student, conditions=prompts, judges=[Judge()])


class Judge:
    measures = ("agreement", "clip_score")
    description = "brightness and length"

    def __call__(self, pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tally]:
        bright = int((pixels.mean(dim=(1, 2, 3)) > 0).sum())
        return {"agreement": Tally(bright, len(pixels)), "clip_score": Tally(sum(map(len, wanted)), len(wanted))}


def test_prompts_are_asked_for_in_turn_and_judged() -> None:
    evaluation = make_text_evaluation()
    full, saved = measured(evaluation)
    assert full.clip_score == (3 * len("a cat") + 2 * len("two big dogs")) / 7
    assert full.conditions.startswith("animals (3 prompts, ") and full.judges == "brightness and length"
    assert full.accuracy is None and full.agreement is not None and full.frechet != saved.frechet
    others = Prompts.encode(["one", "two", "three"], WordEncoder(width=8, max_length=6), "animals")
    assert measured(replace(evaluation, conditions=others))[0].frechet != full.frechet


@pytest.mark.parametrize("batch_size", [2, 7])
def test_batches_do_not_matter_to_prompts_either(batch_size: int) -> None:
    evaluation = make_text_evaluation()
    whole = measured(evaluation)[1]
    parts = measured(replace(evaluation, settings=replace(SETTINGS, batch_size=batch_size)))[1]
    assert parts.frechet == pytest.approx(whole.frechet, rel=1e-4)
    assert (parts.agreement, parts.clip_score) == (whole.agreement, whole.clip_score)


def test_guidance_is_away_from_the_negative_prompt() -> None:
    evaluation = make_text_evaluation()
    encoder = WordEncoder(width=8, max_length=6)
    texts = ["a cat", "", "two big dogs"]
    away = [Prompts.encode(texts, encoder, "animals", negative) for negative in (None, "a cat")]
    candidate = candidates(evaluation.model, [1.0], 5)[0]
    plain, negative = (replace(evaluation, conditions=prompts).measure(candidate) for prompts in away)
    assert plain.frechet != negative.frechet
    schedule = PatchSchedule.constant(2, 2)
    ours = next(sample_pixels(evaluation.model, PixelCodec(1), schedule, replace(SETTINGS, batch_size=7), away[1]))
    sampler = make_sampler(evaluation.model, schedule, SETTINGS)
    captions = encoder.encode([*texts, *texts, texts[0]])
    generator = torch.Generator().manual_seed(0)
    theirs = sampler(captions, negative=encoder.encode(["a cat"]), generator=generator)
    torch.testing.assert_close(ours.pixels, PixelCodec(1).decode(theirs))


def test_a_model_of_captions_needs_prompts() -> None:
    with pytest.raises(ValueError, match="told captions, not classes: give conditions"):
        measured(replace(make_text_evaluation(), conditions=None))


def moving(name: str) -> Iterator[SampledBatch]:
    """Seven clips of three frames of 4x4 pixels, in the batches that a sampler might make of them."""
    x = torch.rand(7, 1, 3, 4, 4, generator=torch.Generator().manual_seed(len(name))) * 2 - 1
    for indices in torch.arange(7).split(3):
        yield SampledBatch(x[indices], indices, 1.0, len(indices))


def make_video_evaluation(**changes: Any) -> Evaluation:
    """Judged by clips and by frames; real clips stand in for a video model's samples."""
    batches = [{"x": batch.pixels} for batch in moving("real ones")]
    clips, frames = ClipFeatures(Projection(), 2), FrameFeatures(Projection())
    references = [reference_of(batches, PixelCodec(1), features, "clips") for features in (clips, frames)]
    fields = {
        "features": clips,
        "reference": references[0],
        "frame_features": frames,
        "frame_reference": references[1],
        "judges": [ClipMotion()],
    }
    return replace(make_evaluation(), **{**fields, **changes})


@pytest.fixture
def _video_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "sample_pixels", lambda *_: moving("samples"))


@pytest.mark.usefixtures("_video_samples")
def test_clips_are_measured_over_clips_per_frame_and_in_motion() -> None:
    evaluation = make_video_evaluation()
    point = measured(evaluation)[0]
    x = torch.cat([batch.pixels for batch in moving("samples")])
    for features, reference, found in (
        (evaluation.features, evaluation.reference, point.frechet),
        (evaluation.frame_features, evaluation.frame_reference, point.frechet_frames),
    ):
        assert features is not None and reference is not None
        expected = FeatureStatistics.of(features(x)).gaussian().distance(reference.statistics)
        assert found == pytest.approx(expected, rel=1e-5)
    assert point.flicker == pytest.approx(float(temporal_flicker(x).mean()))
    assert point.smoothness == pytest.approx(float(motion_smoothness(x).mean()))
    assert point.judges == "smoothness by averages" and point.evaluator.endswith("2 temporal coefficients over clips")


@pytest.mark.usefixtures("_video_samples")
def test_points_without_frames_are_not_taken_for_points_with_them() -> None:
    evaluation, alone = make_video_evaluation(), make_video_evaluation(frame_features=None, frame_reference=None)
    done = measured(alone)
    assert [point.frechet_frames for point in done] == [None, None]
    schedules = candidates(evaluation.model, [1.0], 5)
    assert next(evaluation.curve(schedules, done)).frechet_frames is not None
    assert next(alone.curve(schedules, done)) == done[0]


def test_features_of_frames_come_with_their_reference() -> None:
    with pytest.raises(ValueError, match="give frame_features and frame_reference"):
        make_video_evaluation(frame_reference=None)
    with pytest.raises(ValueError, match="computed with the features projection/0/clips-dct2"):
        make_video_evaluation(frame_reference=make_video_evaluation().reference)


def test_a_reference_of_frames_stops_at_so_many_clips() -> None:
    batches = [{"x": batch.pixels} for batch in moving("real ones")]
    for features, count in ((FrameFeatures(Projection()), 15), (ClipFeatures(Projection(), 2), 5)):
        reference = reference_of(batches, PixelCodec(1), features, "clips", max_samples=5)
        assert reference.statistics.count == count
        assert reference.description == f"clips ({count} samples)"


def measure_on_ranks(rank: int, root: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=2)
    evaluation = make_evaluation()
    own = [batch for index, batch in enumerate(real_images()) if index % 2 == rank]  # 16 and 8 images, less 4
    reference = reference_of(own, PixelCodec(1), evaluation.features, "noise")
    write_csv(measured(replace(evaluation, reference=reference)), f"{root}/{rank}.csv")
    reference.statistics.save(f"{root}/{rank}.npz")
    write_csv(measured(replace(make_text_evaluation(), reference=reference)), f"{root}/text{rank}.csv")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive their group, and unloading them has aborted a rank that was done


def test_ranks_do_not_matter(tmp_path: Path) -> None:
    """Seven samples on two ranks: four and three."""
    mp.spawn(measure_on_ranks, args=(str(tmp_path),), nprocs=2)
    alone, texts = measured(make_evaluation()), measured(make_text_evaluation())
    for rank in range(2):
        points = read_csv(tmp_path / f"{rank}.csv")
        assert [p.frechet for p in points] == pytest.approx([p.frechet for p in alone], rel=1e-5)
        assert [p.relative_flops for p in points] == [p.relative_flops for p in alone]
        assert Gaussian.load(tmp_path / f"{rank}.npz").count == 20
        judged = [(p.agreement, p.clip_score) for p in read_csv(tmp_path / f"text{rank}.csv")]
        assert judged == [(p.agreement, p.clip_score) for p in texts]
    assert [p.frechet for p in read_csv(tmp_path / "0.csv")] == [p.frechet for p in points]
