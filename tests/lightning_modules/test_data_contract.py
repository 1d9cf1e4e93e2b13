"""Data that do not fit the model are named before the first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexidit.conditions import Captions
from flexidit.variants import variant_config
from lightning_modules.data_contract import as_many, check_data, null_captions_of, text_fingerprint_of

TEXT = variant_config("TextDiT-Tiny/2", input_size=8)
NO_NULL = variant_config("TextDiT-Tiny/2", input_size=8, null_caption=False)
LABELS = variant_config("DiT-Tiny/2", input_size=8, num_classes=10)
EMPTY = Captions(torch.randn(1, 5, 64), torch.tensor([[True, False, False, False, False]]))


@pytest.mark.parametrize(
    "config, data, complaint",
    [
        (LABELS, {"sample_shape": (3, 8, 8)}, r"shape \(3, 8, 8\), the model takes \(4, 8, 8\)"),
        (LABELS, {"num_classes": 11}, "11 classes, the model 10"),
        (LABELS, {"caption_shape": (16, 64)}, "the data have captions, the model takes labels"),
        (TEXT, {"num_classes": 10}, "the data have labels, the model takes captions"),
        (TEXT, {"caption_shape": (16, 32)}, "32 wide, the model takes 64"),
        (TEXT, {"caption_shape": (17, 64)}, "17 tokens, the model takes 16 at most"),
    ],
)
def test_data_that_do_not_fit_are_refused(config: Any, data: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_data(config, SimpleNamespace(**data))


@pytest.mark.parametrize(
    "config, data",
    [
        (LABELS, {"sample_shape": (4, 8, 8), "num_classes": 3}),
        (TEXT, {"caption_shape": (5, 64), "num_classes": 10}),
        (TEXT, {"num_classes": None}),
        (TEXT, {}),
    ],
)
def test_what_fits_or_does_not_say_passes(config: Any, data: dict[str, Any]) -> None:
    check_data(config, SimpleNamespace(**data))
    check_data(config, None)


def test_the_data_s_empty_caption_is_for_models_without_their_own() -> None:
    data = SimpleNamespace(null_captions=EMPTY)
    assert null_captions_of(data, NO_NULL) is EMPTY
    assert null_captions_of(data, TEXT) is None
    assert null_captions_of(None, LABELS) is None
    assert null_captions_of(None, variant_config("TextDiT-Tiny/2", null_caption=False, class_dropout_prob=0.0)) is None
    with pytest.raises(ValueError, match=r"probability 0.1, but these weights have no null caption"):
        null_captions_of(SimpleNamespace(), NO_NULL)


def test_one_caption_as_often_as_needed() -> None:
    sizes = torch.tensor([[8.0, 8.0], [8.0, 16.0], [4.0, 4.0]])
    y = Captions(torch.randn(3, 7, 64, dtype=torch.bfloat16), torch.ones(3, 7, dtype=torch.bool), sizes)
    many = as_many(EMPTY, y)
    assert torch.equal(many.embeddings, EMPTY.embeddings.bfloat16().expand(3, -1, -1))
    assert torch.equal(many.mask, EMPTY.mask.expand(3, -1))
    assert many.image_size is sizes


def test_the_text_encoder_is_identified_wherever_it_is_said() -> None:
    said = {"class": "WordEncoder"}
    stored = SimpleNamespace(fingerprint={"codec": "none", "text_encoder": said}, text_encoder=None)
    assert text_fingerprint_of(stored, TEXT) == said
    assert text_fingerprint_of(SimpleNamespace(text_encoder=SimpleNamespace(fingerprint=said)), TEXT) == said
    assert text_fingerprint_of(SimpleNamespace(), TEXT) is None
    assert text_fingerprint_of(None, TEXT) is None
    assert text_fingerprint_of(stored, LABELS) is None
