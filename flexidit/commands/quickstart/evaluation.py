"""What the quick start measures: every schedule, several seeds, each result on disk as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from flexidit.commands.quickstart.recipe import Recipe
from flexidit.commands.quickstart.settings import QuickstartSettings
from flexidit.digit_images import load_digit_images
from flexidit.flops import schedule_cost
from flexidit.latents import PixelCodec
from flexidit.metrics.curve import Evaluation, Reference, SamplingSettings
from flexidit.metrics.curve_candidates import Candidate
from flexidit.metrics.curve_points import CurvePoint, read_csv, write_csv
from flexidit.metrics.digit_classifier import DigitClassifier, train_digit_classifier
from flexidit.metrics.frechet import FeatureStatistics, Gaussian
from flexidit.sampling.schedule import PatchSchedule


@dataclass(frozen=True)
class Judge:
    """A classifier trained on the digits, the statistics of all of them, and the distance between real and real."""

    classifier: DigitClassifier
    reference: Gaussian
    floor: float
    """Frechet distance of as many real digits as a schedule is judged by to all of them; mean over the seeds."""
    num_images: int

    @classmethod
    def train(cls, settings: QuickstartSettings) -> Judge:
        """A few seconds; a pure function of the settings."""
        x, y = load_digit_images()
        classifier = train_digit_classifier(x, y, settings.seed)
        features = classifier.features(x)
        reference = _gaussian(features, classifier)
        draw = _random_draw if settings.has_captions else _balanced_draw
        draws = [draw(y, settings.num_samples, seed) for seed in range(settings.num_seeds)]
        floor = fmean(_gaussian(features[rows], classifier).distance(reference) for rows in draws)
        return cls(classifier, reference, floor, len(x))


def _balanced_draw(y: Tensor, num_samples: int, seed: int) -> Tensor:
    """Random images with classes in turn, as samples have them: unequal shares would count as distance."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    by_class = [order[y[order] == label] for label in range(10)]
    return torch.stack([by_class[i % 10][i // 10] for i in range(num_samples)])


def _random_draw(y: Tensor, num_samples: int, seed: int) -> Tensor:
    """The images whose captions samples are asked for."""
    return torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:num_samples]


def _gaussian(features: Tensor, classifier: DigitClassifier) -> Gaussian:
    statistics = FeatureStatistics()
    statistics.update(features)
    return statistics.gaussian(classifier.fingerprint)


def schedules(model: Any, settings: QuickstartSettings) -> list[Candidate]:
    """Weak first from full budget to all-weak; weak last and fewer steps at some of these costs."""
    powerful, weak, steps = settings.patch_size, settings.weak_patch_size, settings.num_sampling_steps
    full = schedule_cost(model, PatchSchedule.constant(powerful, steps)).total

    def two_sizes(num_weak: int, *, weak_first: bool) -> PatchSchedule:
        if num_weak in (0, steps):
            return PatchSchedule.constant(weak if num_weak else powerful, steps)
        make = PatchSchedule.weak_first if weak_first else PatchSchedule.weak_last
        return make(num_steps=steps, weak_steps=num_weak, weak=weak, powerful=powerful)

    def share(schedule: PatchSchedule) -> float:
        return schedule_cost(model, schedule).total / full

    first = [two_sizes(num_weak, weak_first=True) for num_weak in settings.weak_steps]
    last = [two_sizes(num_weak, weak_first=False) for num_weak in settings.compared_weak_steps]
    fewer = [PatchSchedule.constant(powerful, round(share(schedule) * steps)) for schedule in last]
    budgets = [share(schedule) for schedule in last]
    return [
        *(Candidate(schedule, "weak first", round(share(schedule), 4)) for schedule in first),
        *(Candidate(schedule, "weak last", round(b, 4)) for schedule, b in zip(last, budgets, strict=True)),
        *(Candidate(schedule, "fewer steps", round(b, 4)) for schedule, b in zip(fewer, budgets, strict=True)),
    ]


def measure(model: Any, judge: Judge, recipe: Recipe[Any], file: Path) -> Iterator[list[CurvePoint]]:
    """All points so far, after each new one; points that ``file`` has already are not measured again."""
    done, points = read_csv(file), []
    for seed in range(recipe.settings.num_seeds):
        evaluation = _evaluation(model, judge, recipe, seed)
        for point in evaluation.curve(schedules(model, recipe.settings), done):
            points.append(point)
            write_csv([*points, *(p for p in done if p not in points)], file)
            yield points


def _evaluation(model: Any, judge: Judge, recipe: Recipe[Any], seed: int) -> Evaluation:
    settings = recipe.settings
    return Evaluation(
        model=model,
        codec=PixelCodec(channels=1),
        features=judge.classifier,
        reference=Reference(judge.reference, f"all {judge.num_images} real digits"),
        settings=SamplingSettings(
            num_samples=settings.num_samples,
            batch_size=settings.sampling_batch_size,
            cfg_scale=settings.cfg_scale,
            seed=seed,
            merged=True,
        ),
        full_steps=settings.num_sampling_steps,
        conditions=recipe.conditions(seed),
        judges=recipe.judges(judge),
        model_name="quick start student",
    )


def with_shared_ends(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The points, and those that belong to several lines of the plot once per line.

    Full budget is where all three ways to save begin; all-weak is where the order of the steps ceases to matter.
    """
    costs = [point.relative_flops for point in points]
    full = [point for point in points if point.relative_flops == max(costs)]
    weak = [point for point in points if point.relative_flops == min(costs)]
    shared = [replace(point, series=name) for name in ("weak last", "fewer steps") for point in full]
    return [*points, *shared, *(replace(point, series="weak last") for point in weak)]
