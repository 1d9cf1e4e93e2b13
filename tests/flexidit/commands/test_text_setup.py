from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexidit import create_model
from flexidit.commands.sampling_setup import LoadedModel
from flexidit.commands.text_setup import is_recorded, open_text_encoder, warn_of_cut
from flexidit.text import TextEncoder, WordEncoder


def loaded(text: dict[str, Any] | None = None, width: int = 64) -> LoadedModel:
    model = create_model("TextDiT-Tiny/2", input_size=8, depth=1, caption_channels=width)
    return LoadedModel(model, "", torch.device("cpu"), None, merged=False, is_compiled=False, text=text)


@pytest.mark.parametrize("name", [None, "words"])
def test_words_of_training_need_not_be_named(name: str | None, capsys: Any) -> None:
    recorded = WordEncoder(64, 12, seed=7).fingerprint
    assert open_text_encoder(name, None, loaded(recorded)).fingerprint == recorded
    assert capsys.readouterr().err == ""


def test_words_fit_the_model_where_nothing_is_recorded() -> None:
    encoder = open_text_encoder("words", None, loaded(width=32))
    assert (encoder.width, encoder.max_length) == (32, 16)


def test_another_encoder_than_that_of_training_is_told(capsys: Any) -> None:
    open_text_encoder("words:64x12", None, loaded(WordEncoder(64, 12, seed=7).fingerprint))
    assert "trained with another text encoder than words:64x12" in capsys.readouterr().err


def test_t5_in_the_type_of_training(t5: Path, capsys: Any) -> None:
    recorded = TextEncoder(t5, dtype="float32", max_length=9).fingerprint
    encoder = open_text_encoder(str(t5), None, loaded(recorded, width=32))
    assert encoder.fingerprint == recorded | {"max_length": 16} and capsys.readouterr().err == ""


def test_what_is_compared() -> None:
    recorded = {"class": "T5", "dtype": "bfloat16", "weights_sha256": "ab", "max_length": 120}
    assert is_recorded(recorded, recorded) and is_recorded(recorded, {})
    assert is_recorded(recorded | {"max_length": 77}, recorded)
    assert is_recorded(recorded | {"dtype": "float32", "weights_sha256": "cd"}, recorded)
    assert not is_recorded(recorded | {"weights_sha256": "cd"}, recorded)
    assert not is_recorded(recorded | {"class": "WordEncoder"}, recorded)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "prompts need --text-encoder, the folder or hub id"),
        ({"class": "T5EncoderModel", "width": 64}, r"trained with \(a T5EncoderModel of width 64\)"),
        (WordEncoder(32, 12).fingerprint, "that training recorded gives embeddings of width 32 and the model reads 64"),
        (WordEncoder(64, 20).fingerprint, "captions of 20 tokens and the model reads 16"),
    ],
)
def test_refusals(text: dict[str, Any] | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_text_encoder(None, None, loaded(text))


def test_cut_prompts_are_named(capsys: Any) -> None:
    warn_of_cut(["one two", "one two three"], WordEncoder(max_length=3))
    assert capsys.readouterr().err == "warning: only the first 3 tokens are read of: one two three\n"
