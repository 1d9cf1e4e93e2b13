"""Tallies add up to the whole, and each judge reads what it can read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexidit.digit_images import load_digit_images
from flexidit.draws import Draw
from flexidit.metrics.clip_motion import motion_smoothness, temporal_flicker
from flexidit.metrics.digit_attributes import Count, agreement, real_captions
from flexidit.metrics.judges import ClassAccuracy, ClipMotion, DigitAgreement, MovingDigitAgreement, Tally
from flexidit.metrics.moving_digits import agreement as moving_agreement
from flexidit.metrics.moving_digits import moving_digits_in
from flexidit.moving_captions import MovingDigit, moving_caption_of
from flexidit.moving_digits import DIRECTION_NAMES, SMALL


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


def moving_digits(count: int) -> tuple[Tensor, list[str]]:
    """Clips, and captions in which every second direction is another's."""
    digits, attributes = moving_digits_in(SMALL)
    x, motions = digits.clips(0, [Draw(sample) for sample in range(count)])
    places = (motions.directions + torch.arange(count).numpy() % 2) % 8
    movings = [MovingDigit(attributes[row], DIRECTION_NAMES[place]) for row, place in enumerate(places)]
    return x, [moving_caption_of(moving) for moving in movings]


def test_agreement_of_clips_adds_up_over_batches() -> None:
    x, captions = moving_digits(40)
    judge = MovingDigitAgreement(by_brightness)
    expected = moving_agreement(x, captions, by_brightness)
    assert expected.counts["direction"] == Count(20, 40)
    parts = [judge(x[rows], captions[rows]) for rows in (slice(0, 13), slice(13, 40))]
    total = {name: parts[0][name] + parts[1][name] for name in judge.measures}
    assert total["agreement"].mean == expected.overall
    assert total["accuracy"].mean == expected.shares["class"]
    with pytest.raises(ValueError, match="asked for by class"):
        judge(x, torch.zeros(40))
    with pytest.raises(ValueError, match="a text for every sample, got 40 samples and 3 texts"):
        judge(x, captions[:3])


def test_motion_is_judged_whatever_was_asked_for() -> None:
    x, captions = moving_digits(20)
    judge = ClipMotion()
    whole = judge(x, captions)
    assert whole["flicker"].mean == pytest.approx(float(temporal_flicker(x).mean()))
    assert whole["smoothness"].mean == pytest.approx(float(motion_smoothness(x).mean()))
    parts = [judge(x[rows], torch.zeros(7)) for rows in (slice(0, 7), slice(7, 20))]
    for name in judge.measures:
        assert (parts[0][name] + parts[1][name]).mean == pytest.approx(whole[name].mean)


def test_another_interpolator_judges_otherwise() -> None:
    x, captions = moving_digits(5)
    first = ClipMotion(lambda before, after: before, "the frame before")(x, captions)
    assert first["smoothness"].mean < ClipMotion()(x, captions)["smoothness"].mean
    assert first["flicker"] == ClipMotion()(x, captions)["flicker"]
