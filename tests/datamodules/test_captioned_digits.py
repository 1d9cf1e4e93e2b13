from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from datamodules.captioned_digits import CaptionedDigitsDataModule
from datamodules.digits import DigitsDataModule
from flexidit.conditions import Captions
from flexidit.digit_captions import parse_caption
from flexidit.draws import Draw, draw_choice


def texts_of(data: CaptionedDigitsDataModule, y: Captions) -> list[str]:
    """The captions behind embeddings, of the training images."""
    texts = sorted({text for phrasings in data.captions_of("train") for text in phrasings})
    rows = data.text_encoder.encode(texts).embeddings
    known = {row.numpy().tobytes(): text for text, row in zip(texts, rows, strict=True)}
    return [known[row.numpy().tobytes()] for row in y.embeddings]


def place_of(data: CaptionedDigitsDataModule) -> dict[bytes, list[int]]:
    """Image -> places among the training images: a few digits are there twice."""
    places: dict[bytes, list[int]] = {}
    for place, image in enumerate(data.train_images()[0]):
        places.setdefault(image.numpy().tobytes(), []).append(place)
    return places


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in (
            (one["x"], other["x"]),
            (one["y"].embeddings, other["y"].embeddings),
            (one["y"].mask, other["y"].mask),
        )
    )


def test_batches_are_images_with_captions_of_theirs():
    data = CaptionedDigitsDataModule(batch_size=32, val_fraction=0.2)
    batches = list(data.train_dataloader())
    captions, places = data.captions_of("train"), place_of(data)
    assert len(batches) == len(captions) // 32
    batch = batches[3]
    assert batch["x"].shape == (32, *data.sample_shape)
    assert batch["y"].embeddings.shape == (32, *data.caption_shape)
    for image, text in zip(batch["x"], texts_of(data, batch["y"]), strict=True):
        assert any(text in captions[place] for place in places[image.numpy().tobytes()])


def test_captions_name_the_class_of_their_image():
    data = CaptionedDigitsDataModule()
    for split, labels in (("train", data.train_images()[1]), ("val", data.val_images()[1])):
        named = [{parse_caption(text).label for text in texts} for texts in data.captions_of(split)]
        assert named == [{label} for label in labels.tolist()]


def test_images_and_split_are_those_of_the_class_conditional_module():
    captioned, plain = CaptionedDigitsDataModule(size=16, seed=3), DigitsDataModule(size=16, seed=3)
    assert captioned.train_images()[0].equal(plain.train_images()[0])
    assert captioned.val_images()[1].equal(plain.val_images()[1])
    assert captioned.sample_shape == (1, 16, 16)


def test_the_phrasing_is_a_pure_function_of_seed_epoch_and_sample():
    data = CaptionedDigitsDataModule(seed=5)
    data.setup()
    texts = data.text_encoder.encode
    draws = [Draw(sample, epoch) for epoch in (0, 7) for sample in data.train_indices[:40].tolist()]
    captions = data.captions_of("train")[:40] * 2
    expected = [texts[draw_choice(5, draw, 3)] for draw, texts in zip(draws, captions, strict=True)]
    found = data.dataset.__getitems__(draws)["y"]
    assert found.embeddings.equal(texts(expected).embeddings)
    assert expected[:40] != expected[40:]


def test_all_phrasings_are_drawn():
    data = CaptionedDigitsDataModule(batch_size=128)
    texts = [text for batch in data.train_dataloader() for text in texts_of(data, batch["y"])]
    shares = [sum(text.startswith(start) for text in texts) / len(texts) for start in ("the digit", "a handwritten")]
    assert shares == pytest.approx([1 / 3, 1 / 3], abs=0.04)


def test_a_resume_in_mid_epoch_continues_exactly():
    whole = CaptionedDigitsDataModule(batch_size=100)
    loader, tape = whole.train_dataloader(), []
    for _ in range(2):
        tape += list(loader)
    first = CaptionedDigitsDataModule(batch_size=100)
    passes = iter(first.train_dataloader())
    assert all(equal(next(passes), batch) for batch in tape[:5])
    second = CaptionedDigitsDataModule(batch_size=100)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    loader = second.train_dataloader()
    rest = list(loader) + list(loader)
    assert len(rest) == len(tape) - 5
    assert all(equal(a, b) for a, b in zip(rest, tape[5:], strict=True))


def test_workers_change_nothing():
    alone, helped = CaptionedDigitsDataModule(batch_size=500), CaptionedDigitsDataModule(batch_size=500, num_workers=1)
    pairs = list(zip(alone.train_dataloader(), helped.train_dataloader(), strict=True))
    assert len(pairs) == 3
    assert all(equal(a, b) for a, b in pairs)


def test_validation_is_everything_held_out_with_the_same_captions_each_time():
    data = CaptionedDigitsDataModule(batch_size=50)
    loader = data.val_dataloader()
    first, second = list(loader), list(loader)
    assert torch.cat([batch["x"] for batch in first]).equal(data.val_images()[0])
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_null_caption_is_the_end_token_alone():
    data = CaptionedDigitsDataModule()
    null = data.null_captions
    assert null.embeddings.shape == (1, *data.caption_shape)
    assert null.mask.sum() == 1


def test_captions_fit_into_eleven_tokens_and_are_never_cut():
    CaptionedDigitsDataModule(caption_length=11).setup()
    with pytest.raises(ValueError, match="have more than caption_length 10 tokens"):
        CaptionedDigitsDataModule(caption_length=10).setup()


def test_the_width_of_the_encoder_can_be_chosen():
    assert CaptionedDigitsDataModule(text_encoder="words:24", caption_length=12).caption_shape == (12, 24)


def test_a_single_sample_equals_its_row():
    data = CaptionedDigitsDataModule()
    data.setup()
    one, row = data.dataset[Draw(5, 2)], data.dataset.__getitems__([Draw(4, 2), Draw(5, 2)])
    assert one["x"].equal(row["x"][1])
    assert one["y"].embeddings.equal(row["y"].embeddings[1:])
