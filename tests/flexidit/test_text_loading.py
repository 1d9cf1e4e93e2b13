from importlib.util import find_spec
from time import perf_counter

import pytest
import torch

from flexidit.text import TextEncoder

TEXTS = ["A dog, Running", "", "a man on a red bicycle"]


def test_a_folder_may_hold_both_and_the_tokenizer_may_lie_elsewhere(t5, tmp_path):
    from shutil import copytree

    copytree(t5 / "text_encoder", tmp_path / "flat")
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        TextEncoder(tmp_path / "flat").encode(["a"])
    beside = TextEncoder(tmp_path / "flat", tokenizer=t5)
    copytree(t5 / "tokenizer", tmp_path / "flat", dirs_exist_ok=True)
    flat = TextEncoder(tmp_path / "flat")
    assert TextEncoder(t5).fingerprint == beside.fingerprint == flat.fingerprint
    assert torch.equal(TextEncoder(t5).encode(TEXTS).embeddings, flat.encode(TEXTS).embeddings)


def test_nothing_is_read_before_it_is_needed():
    encoder = TextEncoder("/absent/folder")
    with pytest.raises(FileNotFoundError, match="no tokenizer at /absent/folder: give its folder, or a hub id"):
        encoder.encode(["a"])


def test_weights_in_a_bin_file_are_read_as_tensors_only(t5, tmp_path):
    from shutil import copytree

    from safetensors.torch import load_file

    copytree(t5, tmp_path / "other")
    folder = tmp_path / "other" / "text_encoder"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert TextEncoder(tmp_path / "other").fingerprint == TextEncoder(t5).fingerprint
    torch.save({"weight": pytest.approx(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be used"):
        _ = TextEncoder(tmp_path / "other").model


def broken_copy(t5, folder, break_it):
    from shutil import copytree

    copytree(t5, folder)
    break_it(folder)
    return TextEncoder(folder)


def cut_weights(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def drop_tensors(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[:5]), path, {"format": "pt"})


@pytest.mark.parametrize(
    "break_it, message",
    [
        (cut_weights, "cannot be used"),
        (drop_tensors, "its weights lack"),
        (lambda folder: (folder / "text_encoder" / "config.json").write_text("{"), "cannot be used"),
        (
            lambda folder: (folder / "text_encoder" / "config.json").write_text('{"model_type": "clip"}'),
            "is 'clip', not",
        ),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"), "the tokenizer in"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "the tokenizer in"),
    ],
)
def test_damage_is_one_sentence(t5, tmp_path, break_it, message):
    encoder = broken_copy(t5, tmp_path / "broken", break_it)
    with pytest.raises(ValueError, match=message) as caught:
        _ = encoder.fingerprint
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_vocabulary_is_refused(tmp_path):
    """transformers makes an empty one out of the configuration alone."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "unk_token": "<unk>"}')
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be used"):
        _ = TextEncoder(tmp_path).tokenizer


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed and reads the file")
def test_a_sentencepiece_file_asks_for_its_reader(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"x")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(ValueError, match="is a spiece.model: install its reader with `pip install sentencepiece`"):
        _ = TextEncoder(tmp_path).tokenizer


def test_an_unreachable_hub_is_told_quickly(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = perf_counter()
    with pytest.raises(ValueError, match=r"owner/absent-t5 is no local folder and .* cannot be reached") as caught:
        _ = TextEncoder("owner/absent-t5").model
    assert perf_counter() - start < 10
    assert "\n" not in str(caught.value)
