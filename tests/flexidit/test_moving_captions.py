from itertools import product

import pytest

from flexidit.digit_captions import ATTRIBUTES, CLASS_WORDS, NUM_PHRASINGS, DigitAttributes
from flexidit.moving_captions import (
    DIRECTIONS,
    MovingDigit,
    moving_caption_of,
    moving_captions_of,
    parse_moving_caption,
)

ALL_DIGITS = [
    DigitAttributes(label, *values)
    for label, *values in product(range(len(CLASS_WORDS)), *((None, *values) for values in ATTRIBUTES.values()))
]
ALL = [MovingDigit(digit, direction) for digit in ALL_DIGITS[::5] for direction in DIRECTIONS]


@pytest.mark.parametrize("phrasing", range(NUM_PHRASINGS))
def test_parsing_is_the_inverse_of_each_phrasing(phrasing):
    assert [parse_moving_caption(moving_caption_of(moving, phrasing)) for moving in ALL] == ALL


def test_every_caption_is_its_own():
    captions = [caption for moving in ALL for caption in moving_captions_of(moving)]
    assert len(set(captions)) == len(captions) == len(ALL) * NUM_PHRASINGS


def test_left_and_right_are_of_the_movement_alone():
    for moving in ALL:
        for caption in moving_captions_of(moving):
            named, moved = ({"left", "right"} & set(text.split()) for text in (caption, moving.direction))
            assert named == moved


def test_captions_are_short_enough_for_sixteen_tokens():
    captions = [
        moving_caption_of(MovingDigit(digit, "right and up"), phrasing)
        for digit in ALL_DIGITS
        for phrasing in range(NUM_PHRASINGS)
    ]
    assert max(len(caption.replace(",", " ,").split()) for caption in captions) == 15  # and the end


@pytest.mark.parametrize(
    "text, moving",
    [
        ("7 moving up", MovingDigit(DigitAttributes(7), "up")),
        ("A bold SEVEN moving up and to the right.", MovingDigit(DigitAttributes(7, weight="bold"), "right and up")),
        ("going downwards, a three leaning left", MovingDigit(DigitAttributes(3, slant="left"), "down")),
        ("a one leaning right moving left", MovingDigit(DigitAttributes(1, slant="right"), "left")),
    ],
)
def test_users_may_write_as_they_like(text, moving):
    assert parse_moving_caption(text) == moving


@pytest.mark.parametrize(
    "text, message",
    [
        ("a bold seven", "names one movement, such as 'a bold three moving right and up', got 'a bold seven'"),
        ("a seven moving up moving down", "names one movement"),
        ("a seven moving", "does not say where it moves: one of right, right and down"),
        ("a seven moving left and right", "does not say where it moves"),
        ("a seven moving left and right and up", "does not say where it moves"),
        ("a blod seven moving up", "'blod'"),
        ("a seven moving up quickly", "'quickly'"),
        ("moving up", "names one digit"),
    ],
)
def test_what_cannot_be_understood_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_moving_caption(text)


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="a direction is one of right, right and down.*, got 'north'"):
        MovingDigit(DigitAttributes(1), "north")
