"""Judges: how far samples are what was asked for. Sums and counts, which add up over batches and ranks.

Shape legend: N samples, C channels, F frames, H W height and width in pixels, K classes. A sample is an image
(C, H, W) or a clip (C, F, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor

from flexidit.metrics.prompts import Wanted

if TYPE_CHECKING:
    from flexidit.metrics.clip_motion import Interpolator
    from flexidit.metrics.digit_attributes import Agreement

Classifier: TypeAlias = "Callable[[Tensor], Tensor]"
"""Pixels (N, C, H, W) in [-1, 1] -> scores (N, K)."""


@dataclass(frozen=True)
class Tally:
    """A mean in the making; tallies add up, over batches and ranks."""

    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        """nan of nothing."""
        return self.total / self.count if self.count else math.nan

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.total + other.total, self.count + other.count)


class Judge(Protocol):
    """Measures samples against what they were asked for."""

    @property
    def measures(self) -> Sequence[str]:
        """Fields of :class:`~flexidit.metrics.curve_points.CurvePoint` that it fills."""

    @property
    def description(self) -> str:
        """For the record; changes whenever its judgement would."""

    def __call__(self, pixels: Tensor, wanted: Wanted) -> Mapping[str, Tally]:
        """Each of ``measures`` for samples (N, ...) in [-1, 1] and the N labels or texts behind them."""


class ClassAccuracy:
    """Share of samples that a classifier gives the class that they were asked for.

    Args:
        classifier: Knows the model's classes.
        description: For the record.
    """

    measures = ("accuracy",)

    def __init__(self, classifier: Classifier, description: str = "") -> None:
        self.classifier, self.description = classifier, description

    def __call__(self, pixels: Tensor, wanted: Wanted) -> Mapping[str, Tally]:
        """Hits of (N, C, H, W) and (N,) labels.

        Raises:
            ValueError: texts instead of labels.
        """
        if not isinstance(wanted, Tensor):
            raise ValueError("accuracy compares with class labels, and these samples were asked for by text")
        hits = self.classifier(pixels).argmax(dim=1).cpu() == wanted.cpu()
        return {"accuracy": Tally(int(hits.sum()), len(hits))}


class DigitAgreement:
    """Share of what digit captions say that the images show; and, as accuracy, of the classes that they name.

    See :func:`flexidit.metrics.digit_attributes.agreement`.

    Args:
        classifier: Of the ten digits.
        description: For the record; which classifier.
    """

    measures = ("agreement", "accuracy")

    def __init__(self, classifier: Classifier, description: str = "digit attributes") -> None:
        self.classifier, self.description = classifier, description

    def __call__(self, pixels: Tensor, wanted: Wanted) -> Mapping[str, Tally]:
        """Confirmed statements of (N, 1, H, W) and N captions.

        Raises:
            ValueError: labels instead of texts, or a text that is no digit caption.
        """
        from flexidit.metrics.digit_attributes import agreement

        return _tallies(agreement(pixels, texts_of(wanted, len(pixels), "caption agreement"), self.classifier))


class MovingDigitAgreement:
    """Share of what captions of moving digits say that the clips show; and, as accuracy, of the classes that they name.

    See :func:`flexidit.metrics.moving_digits.agreement`.

    Args:
        classifier: Of the ten digits, cut out of frames; such as the ``logits`` of
            :func:`flexidit.metrics.moving_digits.train_moving_digit_classifier`.
        digit_size: Side of the digits in pixels.
        description: For the record; which classifier.
    """

    measures = ("agreement", "accuracy")

    def __init__(
        self, classifier: Classifier, digit_size: int = 8, description: str = "digit attributes and direction"
    ) -> None:
        self.classifier, self.digit_size, self.description = classifier, digit_size, description

    def __call__(self, pixels: Tensor, wanted: Wanted) -> Mapping[str, Tally]:
        """Confirmed statements of (N, 1, F, H, W) and N captions.

        Raises:
            ValueError: labels instead of texts, or a text that is no caption of a moving digit.
        """
        from flexidit.metrics.moving_digits import agreement

        texts = texts_of(wanted, len(pixels), "caption agreement")
        return _tallies(agreement(pixels, texts, self.classifier, self.digit_size))


class ClipMotion:
    """Temporal flicker and motion smoothness of clips, whatever they were asked for.

    See :mod:`flexidit.metrics.clip_motion`.

    Args:
        interpolate: Frames between frames, for the smoothness; None: their average.
        description: For the record; which interpolation.
    """

    measures = ("flicker", "smoothness")

    def __init__(self, interpolate: Interpolator | None = None, description: str = "smoothness by averages") -> None:
        self.interpolate, self.description = interpolate, description

    def __call__(self, pixels: Tensor, wanted: Wanted) -> Mapping[str, Tally]:
        """Sums over (N, C, F, H, W)."""
        from flexidit.metrics.clip_motion import average, motion_smoothness, temporal_flicker

        flicker, smoothness = temporal_flicker(pixels), motion_smoothness(pixels, self.interpolate or average)
        return {
            "flicker": Tally(float(flicker.sum()), len(pixels)),
            "smoothness": Tally(float(smoothness.sum()), len(pixels)),
        }


class EachFrame:
    """A judge of images for clips: of all frames alike, each compared with what its clip was asked for.

    Args:
        judge: Of images.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge, self.measures = judge, judge.measures
        self.description = f"{judge.description}, of each frame"

    def __call__(self, pixels: Tensor, wanted: Wanted) -> Mapping[str, Tally]:
        """Each measure over the frames of (N, C, F, H, W)."""
        num_frames = pixels.shape[2]
        repeated: Wanted
        if isinstance(wanted, Tensor):
            repeated = wanted.repeat_interleave(num_frames)
        else:
            repeated = [text for text in wanted for _ in range(num_frames)]
        return self.judge(pixels.transpose(1, 2).flatten(0, 1), repeated)


def _tallies(agreement: Agreement) -> dict[str, Tally]:
    counts = agreement.counts
    confirmed, named = (sum(getattr(count, name) for count in counts.values()) for name in ("confirmed", "named"))
    right = counts["class"]
    return {"agreement": Tally(confirmed, named), "accuracy": Tally(right.confirmed, right.named)}


def texts_of(wanted: Wanted, num_samples: int, what: str) -> Sequence[str]:
    """The texts that samples were asked for.

    Raises:
        ValueError: they were asked for by class, or there is another number of them.
    """
    if isinstance(wanted, Tensor):
        raise ValueError(f"{what} compares with texts, and these samples were asked for by class")
    if len(wanted) != num_samples:
        raise ValueError(f"{what} needs a text for every sample, got {num_samples} samples and {len(wanted)} texts")
    return wanted
