"""Tallies add up to the whole, and each judge reads what it can read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexidit.digit_images import load_digit_images
from flexidit.metrics.digit_attributes import agreement, real_captions
from flexidit.metrics.judges import ClassAccuracy, DigitAgreement, Tally


def by_brightness(pixels: Tensor) -> Tensor:
    """A classifier into ten levels of grey."""
    level = ((pixels.mean(dim=(1, 2, 3)) + 1) * 5).long().clamp(0, 9)
    return torch.nn.functional.one_hot(level, 10).float()


def test_tallies_add_up() -> None:
    assert (Tally(2.0, 3) + Tally(1.0, 1)).mean == 0.75
    assert Tally(2.0, 3) + Tally() == Tally(2.0, 3)
    assert math.isnan(Tally().mean)


def test_accuracy_counts_hits() -> None:
    pixels = torch.tensor([-1.0, 0.0, 0.9]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    judge = ClassAccuracy(by_brightness)
    assert judge(pixels, torch.tensor([0, 5, 3])) == {"accuracy": Tally(2, 3)}
    with pytest.raises(ValueError, match="asked for by text"):
        judge(pixels, ["a zero", "a five", "a nine"])


def test_agreement_adds_up_over_batches() -> None:
    """Captions of other digits: some statements hold, some do not."""
    pixels = load_digit_images()[0][:40]
    captions = [phrasings[0] for phrasings in real_captions()[100:140]]
    judge = DigitAgreement(by_brightness)
    parts = [judge(pixels[rows], captions[rows]) for rows in (slice(0, 13), slice(13, 40))]
    expected = agreement(pixels, captions, by_brightness)
    assert 0 < expected.overall < 1
    total = {name: parts[0][name] + parts[1][name] for name in judge.measures}
    assert total["agreement"].mean == expected.overall
    assert total["accuracy"].mean == expected.shares["class"]
    with pytest.raises(ValueError, match="asked for by class"):
        judge(pixels, torch.zeros(40))


def test_true_captions_are_confirmed() -> None:
    pixels, labels = load_digit_images()
    perfect = iter(torch.nn.functional.one_hot(labels[:50], 10).float().split(50))
    judge = DigitAgreement(lambda pixels: next(perfect))
    found = judge(pixels[:50], [phrasings[1] for phrasings in real_captions()[:50]])
    assert found["agreement"].mean == 1 and found["accuracy"] == Tally(50, 50)
