"""True captions of real clips are confirmed, others are told from them, and a distance notices wrong motion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flexidit.draws import Draw
from flexidit.metrics.clip_features import ClipFeatures, FrameFeatures
from flexidit.metrics.digit_attributes import Agreement, Count
from flexidit.metrics.digit_classifier import DigitClassifier
from flexidit.metrics.frechet import FeatureStatistics
from flexidit.metrics.moving_digits import (
    agreement,
    centroids,
    cut_out,
    directions_of,
    moving_digit_features,
    moving_digits_in,
    moving_prompts,
    train_moving_digit_classifier,
    velocities,
)
from flexidit.moving_captions import DIRECTIONS, MovingDigit, moving_caption_of, parse_moving_caption
from flexidit.moving_digits import DIRECTION_NAMES, SMALL, ClipFormat

ATTRIBUTES = ("weight", "slant", "size")


def real_clips(
    clip: ClipFormat = SMALL, samples: Sequence[int] = range(1797), epoch: int = 5
) -> tuple[Tensor, list[str]]:
    """Clips in motions that the classifiers have not seen, and a true caption of each."""
    digits, attributes = moving_digits_in(clip)
    x, motions = digits.clips(11, [Draw(sample, epoch) for sample in samples])
    movings = [
        MovingDigit(attributes[sample], DIRECTION_NAMES[direction])
        for sample, direction in zip(samples, motions.directions, strict=True)
    ]
    return x, [moving_caption_of(*pair) for pair in zip(movings, motions.phrasings.tolist(), strict=True)]


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, list[str]]:
    return real_clips()


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return train_moving_digit_classifier()


def drawn(*corners: tuple[float, float], size: int = 16) -> Tensor:
    """A clip (1, 1, F, S, S) of a bar of 8x2 pixels whose top left corner is there in each frame."""
    clip = torch.full((1, 1, len(corners), size, size), -1.0)
    for frame, (down, right) in enumerate(corners):
        clip[0, 0, frame, int(down) : int(down) + 8, int(right) : int(right) + 2] = 1
    return clip


def test_the_centre_of_a_bar_is_in_its_middle() -> None:
    clip = drawn((0, 3), (2, 5))
    assert centroids(clip).tolist() == [[[3.5, 3.5], [5.5, 5.5]]]
    assert centroids(torch.full_like(clip, -1)).isnan().all()


def test_velocity_is_that_of_the_first_half() -> None:
    clip = drawn((0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (4, 7), (3, 6), (2, 5))
    torch.testing.assert_close(velocities(clip), torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    assert directions_of(clip) == ["right and down"]  # at 27 degrees, nearer to 45 than to 0
    slow = drawn((0, 0), (0, 0), (0, 0), (0, 1), (0, 1), (0, 5), (0, 6), (0, 7))
    assert directions_of(slow) == directions_of(torch.full_like(slow, -1)) == [None]


def test_turned_clips_move_in_turned_directions(real: tuple[Tensor, list[str]]) -> None:
    x = real[0][:100]
    found = [DIRECTION_NAMES.index(str(name)) for name in directions_of(x)]
    turned = [DIRECTION_NAMES.index(str(name)) for name in directions_of(x.rot90(-1, (3, 4)))]
    assert turned == [(place + 2) % 8 for place in found]


@pytest.mark.parametrize("clip", [SMALL, ClipFormat(24, 5, 11)])
def test_the_digit_is_cut_out_of_the_first_frame_as_it_was_put_in(clip: ClipFormat) -> None:
    """Or beside, where the image of the data set has blank columns."""
    x, _ = real_clips(clip, range(100))
    digits = cut_out(x, clip.digit_size)
    assert digits.shape == (100, clip.num_frames, 1, clip.digit_size, clip.digit_size)
    ink = ((digits[:, 0] + 1) / 2).sum((1, 2, 3))
    torch.testing.assert_close(ink, ((x[:, 0, 0] + 1) / 2).sum((1, 2)), rtol=0.02, atol=0)


def test_what_several_squares_hold_is_cut_out_in_the_middle() -> None:
    digits = cut_out(drawn((4, 7), (8, 14)))
    expected = torch.full((8, 8), -1.0)
    expected[:, 3:5] = 1
    assert digits[0, 0, 0].equal(expected)
    assert digits[0, 1, 0, :, 6:].eq(1).all()  # at the border, where there is one square only


def test_real_clips_keep_to_their_captions(real: tuple[Tensor, list[str]], classifier: DigitClassifier) -> None:
    found = agreement(*real, classifier.logits)
    assert found.shares["class"] > 0.99
    assert {name: found.shares[name] for name in (*ATTRIBUTES, "direction")} == dict.fromkeys(
        (*ATTRIBUTES, "direction"), 1.0
    )


def test_shuffled_captions_are_told_from_true_ones(real: tuple[Tensor, list[str]], classifier: DigitClassifier) -> None:
    x, captions = real
    order = torch.randperm(len(captions)).tolist()
    chance = agreement(x, [captions[row] for row in order], classifier.logits)
    assert chance.overall == pytest.approx(0.19, abs=0.03)
    assert chance.shares["class"] == pytest.approx(1 / 10, abs=0.03)
    assert chance.shares["direction"] == pytest.approx(1 / 8, abs=0.03)


def test_captions_of_others_of_the_class_name_the_class_alone(
    real: tuple[Tensor, list[str]], classifier: DigitClassifier
) -> None:
    x, captions = real
    labels = moving_digits_in(SMALL)[0].labels
    order = torch.arange(len(labels))
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order[members] = members[torch.randperm(len(members))]
    chance = agreement(x, [captions[row] for row in order.tolist()], classifier.logits)
    assert chance.overall == pytest.approx(0.455, abs=0.03)
    assert chance.shares["class"] > 0.99
    assert chance.shares["direction"] == pytest.approx(1 / 8, abs=0.03)


def test_enlarged_digits_keep_to_their_captions_too() -> None:
    clip = ClipFormat(24, 9, 12)
    found = agreement(*real_clips(clip), lambda digits: torch.zeros(len(digits), 10), clip.digit_size)
    assert found.shares["direction"] == 1
    assert min(found.shares[name] for name in ATTRIBUTES) > 0.97


def test_a_little_noise_does_not_make_captions_untrue(
    real: tuple[Tensor, list[str]], classifier: DigitClassifier
) -> None:
    noisy = real[0] + 0.1 * torch.randn(real[0].shape)
    assert min(agreement(noisy, real[1], classifier.logits).shares.values()) > 0.98


def test_what_stands_still_and_what_is_blank_has_no_direction(
    real: tuple[Tensor, list[str]], classifier: DigitClassifier
) -> None:
    x, captions = real[0][:50], real[1][:50]
    still = agreement(x[:, :, :1].expand_as(x), captions, classifier.logits)
    assert still.shares["direction"] == 0 and still.shares["class"] > 0.9
    blank = agreement(torch.full_like(x, -1), captions, classifier.logits)
    assert all(blank.counts[name].confirmed == 0 for name in (*ATTRIBUTES, "direction"))


def test_a_digit_that_changes_is_judged_by_all_its_frames() -> None:
    x, captions = real_clips(SMALL, range(10))  # zero to nine
    mixed = torch.cat([x[:1, :, :1], x[1:2, :, 1:]], dim=2)
    seen = []

    def classify(digits: Tensor) -> Tensor:
        seen.append(len(digits))
        scores = torch.zeros(len(digits), 10)
        scores[0, 0], scores[1:, 1] = 3.0, 1.0
        return scores

    assert agreement(mixed, [captions[1]], classify).counts["class"] == Count(1, 1)
    assert seen == [8]
    with pytest.raises(ValueError, match="got 1 clips and 2 captions"):
        agreement(mixed, captions[:2], classify)
    with pytest.raises(ValueError, match="names one movement"):
        agreement(mixed, ["a one"], classify)


def test_agreements_add_up(real: tuple[Tensor, list[str]], classifier: DigitClassifier) -> None:
    x, captions = real[0][:60], real[1][1:61]
    whole, first, rest = (
        agreement(x[rows], captions[rows], classifier.logits) for rows in (slice(None), slice(25), slice(25, None))
    )
    assert first + rest == whole and isinstance(whole, Agreement)


def test_prompts_are_those_of_real_clips() -> None:
    texts = moving_prompts(1797, seed=1)
    assert moving_prompts(50, seed=1) == texts[:50] != moving_prompts(50, seed=2)
    movings = [parse_moving_caption(text) for text in texts]
    assert Counter(moving.digit for moving in movings) == Counter(moving_digits_in(SMALL)[1])
    counts = Counter(moving.direction for moving in movings)
    assert set(counts) == set(DIRECTIONS) and min(counts.values()) > 1797 / 8 * 0.8
    assert len({text.split()[0] for text in texts}) == 3


def test_distances_over_clips_notice_wrong_motion_and_those_of_frames_do_not(real: tuple[Tensor, list[str]]) -> None:
    torch.manual_seed(0)
    extractor = moving_digit_features()
    frames, clips = FrameFeatures(extractor), ClipFeatures(extractor)
    x, other = real[0], real_clips(epoch=6)[0]
    shuffled = torch.stack([clip[:, torch.randperm(8)] for clip in other])

    def distance(features: FrameFeatures | ClipFeatures, y: Tensor) -> float:
        ours, theirs = (FeatureStatistics.of(features(z)).gaussian() for z in (x, y))
        return ours.distance(theirs)

    assert distance(frames, shuffled) == pytest.approx(distance(frames, other), abs=1e-3)
    assert distance(clips, shuffled) > 5 * distance(clips, other)
    assert distance(clips, other.flip(2)) > 5 * distance(clips, other)
    assert "quadrant" in frames.name


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 8, 16, 16)])
def test_what_is_no_clip_of_digits_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"clips of digits are \(N, 1, F, H, W\), got"):
        centroids(torch.zeros(shape))
    with pytest.raises(ValueError, match="digits of 20 pixels cannot be cut out"):
        cut_out(torch.zeros(1, 1, 3, 16, 16), 20)
