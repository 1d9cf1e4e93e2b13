"""Classes, captions of the run's data, or prompts; and what guidance points away from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.conditions import conditions_of
from datamodules.captioned_digits import CaptionedDigitsDataModule
from flexidit import create_model
from flexidit.metrics.prompts import ClassLabels, Prompts
from flexidit.text import WordEncoder

SIZES = {"input_size": 8, "in_channels": 1, "depth": 1, "hidden_size": 16, "num_heads": 2}


def text_model(**options: Any) -> Any:
    return create_model("TextDiT-Tiny/2", **SIZES, **options)


def trainer(datamodule: Any) -> Any:
    return SimpleNamespace(datamodule=datamodule)


class RawData:
    """Batches as they come before the text encoder has seen them."""

    def __init__(self) -> None:
        self.text_encoder = WordEncoder()
        self.num_read = 0

    def val_dataloader(self) -> Any:
        for start in range(0, 100, 2):
            self.num_read += 1
            yield {"x": torch.zeros(2, 3, 8, 8), "texts": [f"number {start}", f"number {start + 1}"]}


def test_classes_are_asked_for_in_turn() -> None:
    model = create_model("DiT-Tiny/2", **SIZES, num_classes=3)
    conditions = conditions_of(trainer(None), model, 5)
    assert isinstance(conditions, ClassLabels)
    assert conditions.told(torch.arange(5)).tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="prompts are for models of captions"):
        conditions_of(trainer(None), model, 5, ["a cat"])


def test_captions_are_the_first_of_validation() -> None:
    data = CaptionedDigitsDataModule(batch_size=4)
    conditions = conditions_of(trainer(data), text_model(), 6)
    assert isinstance(conditions, Prompts)
    assert (len(conditions), conditions.texts, conditions.negative) == (8, None, None)
    told, expected = conditions.told(torch.arange(4)), next(iter(data.val_dataloader()))["y"]
    assert torch.equal(told.mask, expected.mask)
    assert torch.equal(told.embeddings[told.mask], expected.embeddings[expected.mask])


def test_raw_captions_keep_their_texts_and_no_more_are_read_than_needed() -> None:
    conditions = conditions_of(trainer(data := RawData()), text_model(), 3)
    assert isinstance(conditions, Prompts)
    assert conditions.texts == ["number 0", "number 1", "number 2", "number 3"]
    assert data.num_read == 2


def test_prompts_go_through_the_data_s_text_encoder() -> None:
    data = CaptionedDigitsDataModule()
    conditions = conditions_of(trainer(data), text_model(), 9, ["a bold seven", "a thin one"])
    assert isinstance(conditions, Prompts)
    assert conditions.texts == ["a bold seven", "a thin one"]
    expected = data.text_encoder.encode(["a thin one"])
    assert torch.equal(conditions.told(torch.tensor([1])).mask, expected.mask)


def test_guidance_points_away_from_the_data_s_empty_caption_where_the_model_has_none() -> None:
    data = CaptionedDigitsDataModule()
    negative = conditions_of(trainer(data), text_model(null_caption=False), 2).negative
    assert negative is not None
    assert torch.equal(negative.mask, data.null_captions.mask)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "data, prompts, complaint",
    [
        (None, None, "no validation captions to sample for: give prompts"),
        (SimpleNamespace(val_dataloader=list), None, "no validation captions"),
        (SimpleNamespace(text_encoder=None), ["a cat"], "prompts need the text encoder: set data.text_encoder"),
    ],
)
def test_what_cannot_be_had_is_said(data: Any, prompts: list[str] | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        conditions_of(trainer(data), text_model(), 2, prompts)
