from itertools import product

import pytest

from flexidit.digit_captions import (
    ATTRIBUTES,
    CLASS_WORDS,
    NUM_PHRASINGS,
    DigitAttributes,
    caption_of,
    captions_of,
    parse_caption,
)

ALL_DIGITS = [
    DigitAttributes(label, *values)
    for label, *values in product(range(len(CLASS_WORDS)), *((None, *values) for values in ATTRIBUTES.values()))
]


@pytest.mark.parametrize("phrasing", range(NUM_PHRASINGS))
def test_parsing_is_the_inverse_of_each_phrasing(phrasing):
    assert [parse_caption(caption_of(digit, phrasing)) for digit in ALL_DIGITS] == ALL_DIGITS


def test_every_caption_of_every_digit_is_its_own():
    captions = [caption for digit in ALL_DIGITS for caption in captions_of(digit)]
    assert len(set(captions)) == len(captions) == 10 * 36 * NUM_PHRASINGS


def test_captions_are_short_and_of_few_words():
    captions = [caption.replace(",", " ,").split() for digit in ALL_DIGITS for caption in captions_of(digit)]
    assert max(map(len, captions)) == 10
    assert len({word for words in captions for word in words}) <= 30


def test_articles():
    assert caption_of(DigitAttributes(8)) == "an eight"
    assert caption_of(DigitAttributes(1)) == "a one"
    assert caption_of(DigitAttributes(1, slant="upright")) == "an upright one"


@pytest.mark.parametrize(
    "text, digit",
    [
        ("7", DigitAttributes(7)),
        ("A BOLD seven, leaning to the right.", DigitAttributes(7, weight="bold", slant="right")),
        ("a right-leaning thick 7", DigitAttributes(7, weight="bold", slant="right")),
        ("a small straight light three", DigitAttributes(3, weight="thin", slant="upright", size="narrow")),
        ("a seven that leans backward", DigitAttributes(7, slant="left")),
        ("a big, wide zero", DigitAttributes(0, size="wide")),
    ],
)
def test_users_may_write_as_they_like(text, digit):
    assert parse_caption(text) == digit


@pytest.mark.parametrize(
    "text, message",
    [
        ("a blod seven", "'blod' in 'a blod seven' is not a word of digit captions: they know zero, one"),
        ("not a bold seven", "'not'"),
        ("a 42", "'42'"),
        ("a bold digit", "names one digit"),
        ("a seven or rather three", "'or'"),
        ("seven three", "names one digit"),
        ("", "names one digit, such as 'a bold seven leaning right', got ''"),
        ("a thin bold one", "says both thin and bold: name one weight"),
        ("an upright four leaning left", "left and upright: name one slant"),
    ],
)
def test_what_cannot_be_understood_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_caption(text)


def test_named_leaves_out_silence():
    assert DigitAttributes(4, slant="left", size="wide").named == {"slant": "left", "size": "wide"}
    assert DigitAttributes(4).named == {}


@pytest.mark.parametrize("fields, message", [((10,), "0 to 9, got 10"), ((1, "fat"), "one of thin, bold, or None")])
def test_unknown_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DigitAttributes(*fields)
