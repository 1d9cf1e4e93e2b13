"""The judge's sums are torchmetrics' score and CLIP's own logits, in any batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexidit.metrics.clip import CLIPScore
from flexidit.metrics.features import to_byte_levels

TEXTS = ["a cat", "two big dogs", "a", "no cat, dog", "dogs"]
CONTEXT = 12


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer without merges, in CLIP's files; returns its number of tokens."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return len(tokens)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP in transformers' layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    folder.mkdir()
    num_tokens = write_tokenizer(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": num_tokens, "max_position_embeddings": CONTEXT, "eos_token_id": num_tokens - 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for parameter in model.parameters():  # the usual initialisation gives nearly equal embeddings
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def score(clip_folder: Path) -> CLIPScore:
    return CLIPScore(clip_folder)


def pixels(count: int = len(TEXTS), channels: int = 3, size: int = 20) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def direct_cosines(folder: Path, images: Tensor, texts: list[str]) -> Tensor:
    """From CLIP's own matrix of logits, without torchmetrics."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    levels = list(to_byte_levels(images).to(torch.uint8))
    inputs: Any = processor(text=texts, images=levels, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**inputs).logits_per_image.diag() / model.logit_scale.exp()


def test_it_is_the_cosine_in_clip(score: CLIPScore, clip_folder: Path) -> None:
    expected = 100 * direct_cosines(clip_folder, pixels(), TEXTS)
    assert expected.std() > 1  # images and texts differ enough to tell
    tally = score(pixels(), TEXTS)["clip_score"]
    assert tally.count == len(TEXTS)
    assert tally.mean == pytest.approx(expected.mean().item(), abs=1e-3)
    ones = [score(pixels()[i : i + 1], TEXTS[i : i + 1])["clip_score"].mean for i in range(len(TEXTS))]
    assert ones == pytest.approx(expected.tolist(), abs=1e-3)


def test_batches_add_up_to_torchmetrics_own_result(score: CLIPScore) -> None:
    from torchmetrics.multimodal import CLIPScore as Metric

    metric = Metric(lambda: (score.model, score._preprocess))
    metric.update(list(to_byte_levels(pixels()).to(torch.uint8)), TEXTS)
    parts = [score(pixels()[rows], TEXTS[rows])["clip_score"] for rows in (slice(0, 2), slice(2, 5))]
    mean = (parts[0] + parts[1]).mean
    assert max(mean, 0) == pytest.approx(metric.compute().item(), abs=1e-4)


def test_long_texts_are_read_as_their_beginning(score: CLIPScore) -> None:
    """CLIP reads a text at its end token: cut without it, as torchmetrics would, the text would be lost."""
    words = list("abcdefghijklmnop")
    whole, beginning = score(pixels(1), [" ".join(words)]), score(pixels(1), [" ".join(words[: CONTEXT - 2])])
    assert whole == beginning != score(pixels(1), [" ".join(words[: CONTEXT - 3])])


def test_grey_images_are_read_as_three_equal_channels(score: CLIPScore) -> None:
    grey = pixels(channels=1)
    assert score(grey, TEXTS) == score(grey.expand(-1, 3, -1, -1), TEXTS)


def test_the_description_names_the_weights(score: CLIPScore, clip_folder: Path) -> None:
    again = CLIPScore(clip_folder)
    assert again.fingerprint == score.fingerprint
    assert score.description == f"CLIP score (tiny-clip {score.fingerprint[:8]})"
    del again.__dict__["fingerprint"]
    again.model.clip.visual_projection.weight.data[0, 0] += 1
    assert again.fingerprint != score.fingerprint


def test_labels_and_other_numbers_of_texts_are_refused(score: CLIPScore) -> None:
    with pytest.raises(ValueError, match="asked for by class"):
        score(pixels(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="got 2 samples and 5 texts"):
        score(pixels(2), TEXTS)


def test_weights_that_cannot_be_had(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(FileNotFoundError, match="no CLIP at ./nowhere"):
        CLIPScore("./nowhere")
    with pytest.raises(FileNotFoundError, match="no CLIP in"):
        CLIPScore(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="owner/clip is no local folder and the hub did not deliver a CLIP"):
        CLIPScore("owner/clip")
    damaged = tmp_path / "damaged"
    shutil.copytree(clip_folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="the CLIP in .* cannot be used") as error:
        CLIPScore(damaged)
    assert "\n" not in str(error.value)
    other = tmp_path / "other"
    shutil.copytree(clip_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(ValueError, match="its model_type is 't5', not 'clip'"):
        CLIPScore(other)


def test_a_missing_tokenizer_is_not_replaced_by_an_empty_one(clip_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(clip_folder, copy)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="the CLIP in .* cannot be used"):
        CLIPScore(copy)
