"""Measures obey their geometry, the stored numbers are those of the data, and true captions are told from others."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexidit.digit_captions import ATTRIBUTES, parse_caption
from flexidit.digit_images import load_digit_images
from flexidit.metrics import digit_attributes
from flexidit.metrics.digit_attributes import (
    CONFIRMED_QUANTILE,
    LIMITS,
    NAMED_QUANTILE,
    TYPICAL,
    UPRIGHT,
    UPRIGHT_CONFIRMED_QUANTILE,
    UPRIGHT_NAMED_QUANTILE,
    Agreement,
    Count,
    agreement,
    attributes_of,
    deviations,
    measure,
    prompts,
    real_captions,
)
from flexidit.metrics.digit_classifier import DigitClassifier, train_digit_classifier


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return load_digit_images()


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> DigitClassifier:
    return train_digit_classifier(*digits, num_epochs=8)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """One true caption of each digit."""
    return [phrasings[row % 3] for row, phrasings in enumerate(real_captions())]


def drawn(*rows: str) -> Tensor:
    """An image of 8x8 pixels, '#' being ink, blank around the given rows."""
    ink = torch.tensor([[float(character == "#") for character in row.ljust(8)] for row in rows])
    top = (8 - len(rows)) // 2
    return F.pad(ink, (0, 0, top, 8 - len(rows) - top))[None, None] * 2 - 1


def stacked(pixels: Tensor) -> Tensor:
    """All three measures, (N, 3)."""
    return torch.stack(astuple(measure(pixels)), dim=1)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (28, 19)])
def test_enlarged_digits_measure_as_their_originals(digits: tuple[Tensor, Tensor], size: tuple[int, int]) -> None:
    pixels = digits[0][:200].double()
    torch.testing.assert_close(stacked(F.interpolate(pixels, size, mode="bilinear")), stacked(pixels))


def test_a_mirror_turns_the_slant_and_nothing_else(digits: tuple[Tensor, Tensor]) -> None:
    expected = stacked(digits[0]) * torch.tensor([1, -1, 1])
    torch.testing.assert_close(stacked(digits[0].flip(3)), expected)


def test_the_place_does_not_matter() -> None:
    here = drawn("###", " ##", "#  ", "###")
    torch.testing.assert_close(stacked(here.roll((1, 4), (2, 3))), stacked(here))


def test_paler_ink_is_less_weight_in_proportion_and_nothing_else(digits: tuple[Tensor, Tensor]) -> None:
    faint = digit_attributes.FAINT
    ink = (digits[0].double() + 1) / 2
    paler = (ink - faint).clamp(min=0) * 0.6 + faint  # 0.6 of what is left after the faint is taken off
    torch.testing.assert_close(stacked(paler * 2 - 1), stacked(digits[0]) * torch.tensor([0.6, 1, 1]))


def test_shear_is_the_slant_and_leaves_the_rest() -> None:
    upright, right = drawn("##", "##", "##", "##"), drawn("   ##", "  ##", " ##", "##")
    torch.testing.assert_close(stacked(right) - stacked(upright), torch.tensor([[0.0, 1, 0]], dtype=torch.float64))


def test_thicker_strokes_weigh_more_and_longer_ones_are_wider() -> None:
    ring = drawn("####", "#  #", "#  #", "#  #", "#  #", "####")
    thick = drawn("####", "####", "#  #", "#  #", "####", "####")
    wide = drawn("######", "#    #", "#    #", "#    #", "#    #", "######")
    weight, _, size = stacked(torch.cat([ring, thick, wide])).unbind(1)
    assert weight[1] > 1.2 * weight[0]
    assert size[2] > 1.3 * size[0]
    torch.testing.assert_close(weight[2], weight[0], rtol=0.05, atol=0)  # same stroke, larger digit


def test_stored_numbers_are_those_of_the_data(digits: tuple[Tensor, Tensor]) -> None:
    pixels, labels = digits
    medians = torch.stack([stacked(pixels[labels == label]).quantile(0.5, dim=0) for label in range(10)])
    torch.testing.assert_close(torch.tensor(TYPICAL, dtype=torch.float64), medians, atol=6e-4, rtol=0)
    for name, deviation in deviations(pixels, labels).items():
        quantiles = [deviation.abs().quantile(q).item() for q in (NAMED_QUANTILE, CONFIRMED_QUANTILE)]
        assert list(LIMITS[name]) == pytest.approx(quantiles, abs=6e-4)
    slant = deviations(pixels, labels)["slant"].abs()
    quantiles = [slant.quantile(q).item() for q in (UPRIGHT_NAMED_QUANTILE, UPRIGHT_CONFIRMED_QUANTILE)]
    assert list(UPRIGHT) == pytest.approx(quantiles, abs=6e-4)


def test_attributes_say_different_things(digits: tuple[Tensor, Tensor]) -> None:
    correlation = torch.corrcoef(torch.stack(list(deviations(*digits).values()))).fill_diagonal_(0)
    assert correlation.abs().max() < 0.2


def test_every_value_is_named_often_and_most_captions_name_something(digits: tuple[Tensor, Tensor]) -> None:
    found = attributes_of(*digits)
    counts = Counter(value for digit in found for value in digit.named.values())
    assert set(counts) == {value for values in ATTRIBUTES.values() for value in values}
    assert min(counts.values()) > 0.15 * len(found)
    assert sum(bool(digit.named) for digit in found) > 0.8 * len(found)


def test_captions_say_what_was_measured(digits: tuple[Tensor, Tensor]) -> None:
    for digit, phrasings in zip(attributes_of(*digits), real_captions(), strict=True):
        assert [parse_caption(text) for text in phrasings] == [digit] * 3


def test_what_is_named_is_confirmed_and_values_exclude_one_another() -> None:
    deviation = torch.linspace(-0.3, 0.3, 6001, dtype=torch.float64)
    for name, values in ATTRIBUTES.items():
        named = torch.stack([digit_attributes._holds(name, value, deviation, confirm=False) for value in values])
        confirmed = torch.stack([digit_attributes._holds(name, value, deviation, confirm=True) for value in values])
        assert bool((confirmed | ~named).all())
        assert confirmed.sum(0).max() == 1


def test_real_digits_keep_to_their_captions(
    digits: tuple[Tensor, Tensor], captions: list[str], classifier: DigitClassifier
) -> None:
    found = agreement(digits[0], captions, classifier.logits)
    assert found.shares["class"] > 0.99
    assert {name: found.shares[name] for name in ATTRIBUTES} == dict.fromkeys(ATTRIBUTES, 1.0)


def test_shuffled_captions_are_told_from_true_ones(
    digits: tuple[Tensor, Tensor], captions: list[str], classifier: DigitClassifier
) -> None:
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    chance = agreement(digits[0], [captions[row] for row in order], classifier.logits)
    assert chance.overall == pytest.approx(0.22, abs=0.02)
    assert chance.shares["class"] == pytest.approx(0.1, abs=0.03)
    assert all(0.22 < chance.shares[name] < 0.43 for name in ATTRIBUTES)


def test_a_little_noise_does_not_make_captions_untrue(
    digits: tuple[Tensor, Tensor], captions: list[str], classifier: DigitClassifier
) -> None:
    pixels = digits[0] + 0.1 * torch.randn(digits[0].shape)
    assert min(agreement(pixels, captions, classifier.logits).shares.values()) > 0.98


def always(label: int) -> object:
    return lambda pixels: F.one_hot(torch.full((len(pixels),), label), 10).float()


def test_a_class_that_is_wrong_does_not_hide_the_rest(digits: tuple[Tensor, Tensor], captions: list[str]) -> None:
    found = agreement(digits[0], captions, always(3))  # type: ignore[arg-type]
    assert found.counts["class"] == Count(int((digits[1] == 3).sum()), 1797)
    assert found.shares["weight"] == 1


@pytest.mark.parametrize("pixels", [torch.full((2, 1, 8, 8), -1.0), drawn("########").expand(2, 1, 8, 8)])
def test_blank_images_confirm_no_attribute(pixels: Tensor) -> None:
    texts = ["an upright bold wide one", "a thin narrow one leaning left"]
    found = agreement(pixels, texts, always(1))  # type: ignore[arg-type]
    assert found.counts == {"class": Count(2, 2), **dict.fromkeys(ATTRIBUTES, Count(0, 2))}
    assert found.overall == 0.25


def test_agreements_add_up(digits: tuple[Tensor, Tensor], captions: list[str]) -> None:
    whole, first, rest = (agreement(digits[0][rows], captions[rows], always(3)) for rows in (  # type: ignore[arg-type]
        slice(None), slice(700), slice(700, None)
    ))  # fmt: skip
    assert first + rest == whole


def test_nothing_said_is_no_share() -> None:
    found = agreement(drawn("##", "##"), ["a one"], always(1))  # type: ignore[arg-type]
    assert found.overall == 1
    assert math.isnan(found.shares["weight"])
    assert math.isnan(Agreement({"class": Count()}).overall)


def test_prompts_are_those_of_real_digits() -> None:
    known = Counter(text for phrasings in real_captions() for text in phrasings)
    drawn_texts = prompts(1797 + 50, seed=1)
    once = Counter(drawn_texts[:1797])
    assert all(once[text] <= known[text] for text in once)  # every digit once
    assert len(drawn_texts) == 1847
    shares = Counter(parse_caption(text) for text in drawn_texts[:1797])
    assert shares == Counter(parse_caption(phrasings[0]) for phrasings in real_captions())


def test_prompts_are_a_pure_function_of_the_seed() -> None:
    state = torch.get_rng_state()
    assert prompts(20, seed=3) == prompts(64, seed=3)[:20] != prompts(20, seed=4)
    assert prompts(0) == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 8, 8), (1, 1, 7, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 8x8 pixels, got"):
        measure(torch.zeros(shape))


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 images and 1 captions"):
        agreement(torch.zeros(2, 1, 8, 8), ["a one"], always(1))  # type: ignore[arg-type]
