"""What the quick start judges samples by: features, statistics of all real digits, and a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from flexidit.commands.quickstart.settings import QuickstartSettings, TextToVideoSettings
from flexidit.digit_images import load_digit_images
from flexidit.draws import Draw
from flexidit.metrics.clip_features import ClipFeatures, FrameFeatures
from flexidit.metrics.curve import Reference
from flexidit.metrics.digit_classifier import DigitClassifier, train_digit_classifier
from flexidit.metrics.frechet import FeatureStatistics, Gaussian
from flexidit.metrics.moving_digits import moving_digit_features, train_moving_digit_classifier
from flexidit.moving_digits import ClipFormat, MovingDigits


@dataclass(frozen=True)
class Judge:
    """A classifier trained on the digits, the statistics of all of them, and the distance between real and real."""

    classifier: DigitClassifier
    features: Any
    """Of whole samples, for the Frechet distance."""
    reference: Reference
    floor: float
    """Frechet distance of as many real digits as a schedule is judged by to all of them; mean over the seeds."""
    frame_features: Any = None
    """Of the frames of clips; None for images."""
    frame_reference: Reference | None = None


def image_judge(settings: QuickstartSettings) -> Judge:
    """A few seconds; a pure function of the settings."""
    x, y = load_digit_images()
    classifier = train_digit_classifier(x, y, settings.seed)
    features = classifier.features(x)
    reference = _gaussian(features, classifier)
    draw = _random_draw if settings.has_captions else _balanced_draw
    draws = [draw(y, settings.num_samples, seed) for seed in range(settings.num_seeds)]
    floor = fmean(_gaussian(features[rows], classifier).distance(reference) for rows in draws)
    return Judge(classifier, classifier, Reference(reference, f"all {len(x)} real digits"), floor)


def clip_judge(settings: TextToVideoSettings) -> Judge:
    """Of every digit in one motion; a pure function of the settings, and half a minute."""
    clip = ClipFormat(settings.canvas_size, settings.num_frames)
    frames = moving_digit_features(settings.canvas_size, settings.num_frames, seed=settings.seed)
    whole, single = ClipFeatures(frames), FrameFeatures(frames)
    digits = MovingDigits(clip)

    def real(epoch: int) -> Tensor:
        return digits.clips(settings.seed, [Draw(sample, epoch) for sample in range(len(digits))])[0]

    with torch.no_grad():
        clips = real(0)
        reference = _gaussian(whole(clips), whole)
        others = [_some(real(1 + seed), settings.num_samples, seed) for seed in range(settings.num_seeds)]
        floor = fmean(_gaussian(whole(some), whole).distance(reference) for some in others)
        name = f"all {len(clips)} real digits in motion"
        return Judge(
            classifier=train_moving_digit_classifier(clip, settings.seed),
            features=whole,
            reference=Reference(reference, name),
            floor=floor,
            frame_features=single,
            frame_reference=Reference(_gaussian(single(clips), single), f"frames of {name}"),
        )


def _some(x: Tensor, count: int, seed: int) -> Tensor:
    return x[_random_draw(x[:, 0, 0, 0, 0], count, seed)]


def _balanced_draw(y: Tensor, num_samples: int, seed: int) -> Tensor:
    """Random images with classes in turn, as samples have them: unequal shares would count as distance."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    by_class = [order[y[order] == label] for label in range(10)]
    return torch.stack([by_class[i % 10][i // 10] for i in range(num_samples)])


def _random_draw(y: Tensor, num_samples: int, seed: int) -> Tensor:
    """The samples whose captions samples are asked for."""
    return torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:num_samples]


def _gaussian(features: Tensor, extractor: Any) -> Gaussian:
    statistics = FeatureStatistics()
    statistics.update(features)
    return statistics.gaussian(extractor.fingerprint)
