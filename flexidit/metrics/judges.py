"""Judges: how far samples are what was asked for. Sums and counts, which add up over batches and ranks.

Shape legend: N samples, C channels, H W height and width in pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from flexidit.metrics.prompts import Wanted

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
        """Each of ``measures`` for samples (N, C, H, W) in [-1, 1] and the N labels or texts behind them."""


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

        counts = agreement(pixels, texts_of(wanted, len(pixels), "caption agreement"), self.classifier).counts
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
        raise ValueError(f"{what} needs a text for every image, got {num_samples} images and {len(wanted)} texts")
    return wanted
