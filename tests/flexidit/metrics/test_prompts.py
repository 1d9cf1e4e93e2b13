"""The i-th sample has the i-th prompt, embedded as if it were alone; files of prompts are read in a known order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flexidit.conditions import Captions
from flexidit.metrics.prompts import CaptionTable, ClassLabels, Prompts, read_coco_prompts, read_prompts
from flexidit.text import WordEncoder

TEXTS = ["a cat", "", "three very big dogs", "one"]
ENCODER = WordEncoder(width=8, max_length=6)


def test_classes_in_turn() -> None:
    labels = ClassLabels(3)
    assert labels.told(torch.tensor([4, 5, 6])).tolist() == labels.wanted(torch.tensor([4, 5, 6])).tolist() == [1, 2, 0]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2], [3, 3, 1], []])
def test_rows_of_the_table_are_the_captions(rows: list[int]) -> None:
    captions = ENCODER.encode(TEXTS)
    for table in (CaptionTable([captions]), CaptionTable([captions[:1], captions[1:]])):
        found = table[torch.tensor(rows, dtype=torch.long)]
        assert torch.equal(found.embeddings, captions[rows].embeddings)
        assert torch.equal(found.mask, captions[rows].mask)


def test_the_table_keeps_gaps_sizes_and_types() -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]])
    embeddings = torch.randn(2, 3, 4).bfloat16() * mask[..., None]
    captions = Captions(embeddings, mask, torch.tensor([[8, 16], [32, 8]]))
    found = CaptionTable([captions])[torch.tensor([1, 0])]
    assert torch.equal(found.embeddings, embeddings.flip(0)) and found.embeddings.dtype == torch.bfloat16
    assert found.image_size is not None and found.image_size.tolist() == [[32, 8], [8, 16]]


def test_prompts_come_in_turn() -> None:
    prompts = Prompts.encode(TEXTS, ENCODER)
    indices = torch.tensor([3, 4, 9])
    assert prompts.wanted(indices) == ["one", "a cat", ""]
    assert torch.equal(prompts.told(indices).embeddings, ENCODER.encode(["one", "a cat", ""]).embeddings)


def test_encoding_in_chunks_is_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Prompts.encode(TEXTS, ENCODER).told(torch.arange(4))
    monkeypatch.setattr("flexidit.metrics.prompts._CHUNK", 3)
    assert torch.equal(Prompts.encode(TEXTS, ENCODER).told(torch.arange(4)).embeddings, whole.embeddings)


def test_the_description_changes_with_the_texts_and_the_negative_prompt() -> None:
    described = {
        Prompts.encode(texts, ENCODER, name, negative).description
        for texts, name, negative in ((TEXTS, "a", None), (TEXTS[:3], "a", None), (TEXTS, "b", None), (TEXTS, "a", ""))
    }
    assert len(described) == 4
    away = Prompts.encode(TEXTS, ENCODER, "a", "blurred")
    assert "away from 'blurred'" in away.description and away.negative is not None and len(away.negative) == 1
    assert away.description == Prompts.encode(TEXTS, ENCODER, "a", "blurred").description


def test_embeddings_alone_are_enough_to_sample() -> None:
    prompts = Prompts(None, ENCODER.encode(TEXTS), "validation captions")
    assert len(prompts.told(torch.arange(5))) == 5
    assert prompts.description != Prompts(None, ENCODER.encode(TEXTS[::-1]), "validation captions").description
    with pytest.raises(ValueError, match="only the embeddings are known"):
        prompts.wanted(torch.arange(5))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="4 texts and 3 captions"):
        Prompts(TEXTS, ENCODER.encode(TEXTS[:3]))
    with pytest.raises(ValueError, match="there are no prompts"):
        Prompts.encode([], ENCODER)
    with pytest.raises(ValueError, match="one negative caption for all prompts, or none; got 2"):
        Prompts(TEXTS, ENCODER.encode(TEXTS), negative=ENCODER.encode(["a", "b"]))


def test_a_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeff a cat \n\ncaf\u00e9\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "caf\u00e9"]
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, kind, sentence in (
        ("missing.txt", FileNotFoundError, "no prompts at"),
        ("binary.txt", ValueError, "is not UTF-8"),
        ("empty.txt", ValueError, "holds no prompt"),
    ):
        with pytest.raises(kind, match=sentence):
            read_prompts(tmp_path / name)


def test_coco_captions_come_in_rounds_over_the_images(tmp_path: Path) -> None:
    pairs = [(7, "seven, first"), (3, "three, first"), (7, " seven, second "), (3, ""), (5, None), (7, "seven, third")]
    annotations = [{"image_id": image, "caption": caption} for image, caption in pairs]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": [*annotations, "damaged"]}))
    expected = ["seven, first", "three, first", "seven, second", "seven, third"]
    assert read_coco_prompts(tmp_path / "captions.json") == expected


@pytest.mark.parametrize("content", ["[]", "{", '{"annotations": 3}', '{"annotations": [{"caption": "no image"}]}'])
def test_what_is_no_annotation_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ValueError, match="is not COCO's annotation of captions"):
        read_coco_prompts(tmp_path / "captions.json")
    with pytest.raises(FileNotFoundError, match="no captions at"):
        read_coco_prompts(tmp_path / "missing.json")


def test_real_annotations(test_data: Path) -> None:
    (path,) = (test_data / "coco_mini" / "annotations").glob("captions_*.json")
    content = json.loads(path.read_text())
    prompts = read_coco_prompts(path)
    num_images = len({entry["image_id"] for entry in content["annotations"]})
    assert len(prompts) == len(content["annotations"])
    assert prompts[0] == content["annotations"][0]["caption"].strip()
    assert len(set(prompts[:num_images])) > 0.9 * num_images
