"""Batches are real clips with true captions, pure functions of (seed, epoch, digit), and resume exactly."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from datamodules.captioned_digits import CaptionedDigitsDataModule
from datamodules.moving_digits import MovingDigitsDataModule
from flexidit.conditions import Captions
from flexidit.draws import Draw
from flexidit.metrics.moving_digits import directions_of
from flexidit.moving_captions import parse_moving_caption


@pytest.fixture(scope="module")
def data() -> MovingDigitsDataModule:
    """Set up; no test changes it."""
    data = MovingDigitsDataModule(batch_size=100)
    data.setup()
    return data


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in (
            (one["x"], other["x"]),
            (one["y"].embeddings, other["y"].embeddings),
            (one["y"].mask, other["y"].mask),
        )
    )


def is_caption(data: MovingDigitsDataModule, text: str, y: Captions) -> bool:
    return data.text_encoder.encode([text]).embeddings.equal(y.embeddings)


def test_batches_are_clips_with_captions_of_theirs(data: MovingDigitsDataModule) -> None:
    batch, captions = next(iter(data.val_dataloader())), data.captions_of("val")
    assert batch["x"].shape == (100, *data.sample_shape) == (100, 1, 8, 16, 16)
    assert batch["y"].embeddings.shape == (100, *data.caption_shape)
    for row, texts in enumerate(captions[:100]):
        assert sum(is_caption(data, text, batch["y"][row : row + 1]) for text in texts) == 1


def test_captions_name_class_and_direction_of_their_clip(data: MovingDigitsDataModule) -> None:
    for split, (x, labels) in (("train", data.train_images()), ("val", data.val_images())):
        movings = [{parse_moving_caption(text) for text in texts} for texts in data.captions_of(split)]
        assert {len(meanings) for meanings in movings} == {1}
        assert [moving.digit.label for (moving,) in movings] == labels.tolist()
        assert [moving.direction for (moving,) in movings] == directions_of(x)


def test_the_split_is_that_of_still_digits(data: MovingDigitsDataModule) -> None:
    still = CaptionedDigitsDataModule()
    still.setup()
    assert data.train_indices.equal(still.train_indices) and data.val_indices.equal(still.val_indices)
    assert data.val_images()[0][0, 0, 0].sum() > -256  # there is a digit


def test_a_sample_is_a_pure_function_of_seed_epoch_and_digit(data: MovingDigitsDataModule) -> None:
    draws = [Draw(sample, epoch) for epoch in (0, 3) for sample in (5, 9, 700)]
    batch = data.dataset.__getitems__(draws)
    for row, draw in enumerate(draws):
        one = data.dataset[draw]
        assert one["x"].equal(batch["x"][row]) and one["y"].embeddings.equal(batch["y"].embeddings[row : row + 1])
    assert not batch["x"][:3].equal(batch["x"][3:])
    other = MovingDigitsDataModule(seed=1)
    other.setup()
    assert not other.dataset.__getitems__(draws)["x"].equal(batch["x"])


def test_single_frames_are_frames_of_the_same_clips(data: MovingDigitsDataModule) -> None:
    images = MovingDigitsDataModule(batch_size=100, single_frames=True)
    images.setup()
    assert images.sample_shape == (1, 16, 16)
    draws = [Draw(sample, epoch) for epoch in (0, 1, 2) for sample in (5, 9, 700)]
    clips, frames = (one.dataset.__getitems__(draws) for one in (data, images))
    assert frames["x"].shape == (9, 1, 16, 16) and frames["y"].embeddings.equal(clips["y"].embeddings)
    match = (clips["x"] == frames["x"].unsqueeze(2)).flatten(3).all(3).squeeze(1)  # (N, F)
    assert match.any(1).all() and len(set(match.int().argmax(1).tolist())) > 1
    again = images.dataset.__getitems__(draws)["x"]
    assert again.equal(frames["x"])


def test_a_resume_in_mid_epoch_continues_exactly() -> None:
    whole = MovingDigitsDataModule(batch_size=200, caption_length=16)
    loader = whole.train_dataloader()
    tape = list(loader) + list(loader)
    first = MovingDigitsDataModule(batch_size=200)
    passes = iter(first.train_dataloader())
    assert all(equal(next(passes), batch) for batch in tape[:3])
    second = MovingDigitsDataModule(batch_size=200)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    loader = second.train_dataloader()
    rest = list(loader) + list(loader)
    assert len(rest) == len(tape) - 3
    assert all(equal(a, b) for a, b in zip(rest, tape[3:], strict=True))


def test_workers_change_nothing(data: MovingDigitsDataModule) -> None:
    alone, helped = MovingDigitsDataModule(batch_size=700), MovingDigitsDataModule(batch_size=700, num_workers=1)
    pairs = list(zip(alone.train_dataloader(), helped.train_dataloader(), strict=True))
    assert len(pairs) == 2 and all(equal(a, b) for a, b in pairs)


def test_validation_is_everything_held_out_with_the_same_draws_each_time(data: MovingDigitsDataModule) -> None:
    loader = data.val_dataloader()
    first, second = list(loader), list(loader)
    assert torch.cat([batch["x"] for batch in first]).equal(data.val_images()[0])
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


def test_sizes_can_be_chosen() -> None:
    data = MovingDigitsDataModule(24, 5, 12, text_encoder="words:24", caption_length=20)
    assert data.sample_shape == (1, 5, 24, 24) and data.caption_shape == (20, 24)
    assert data.null_captions.mask.sum() == 1
    assert data.val_images()[0].shape[1:] == data.sample_shape
    with pytest.raises(ValueError, match="half as many more"):
        MovingDigitsDataModule(canvas_size=16, digit_size=12)


def test_captions_fit_into_sixteen_tokens_and_are_never_cut() -> None:
    with pytest.raises(ValueError, match="have more than caption_length 15 tokens"):
        MovingDigitsDataModule(caption_length=15).setup()
