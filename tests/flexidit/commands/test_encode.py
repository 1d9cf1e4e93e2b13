import argparse
import json

import pytest
import torch

from flexidit.caption_shards import CaptionedLatents
from flexidit.commands import encode
from flexidit.latent_shards import LatentShards


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    encode.configure(parser)
    return encode.run(parser.parse_args([str(word) for word in words]))


def test_encodes_a_folder_and_says_what_it_did(image_folder, tiny_vae, tmp_path, capsys):
    (image_folder / "n00000001" / "05.jpg").write_bytes(b"")
    assert run(image_folder, "--vae", tiny_vae, "--size", 16, "--out", tmp_path / "out", "--workers", 0) == 0
    printed = capsys.readouterr().out
    assert "11 latents of 4 x 4 x 4 in 1 shards" in printed
    assert "1 image skipped: n00000001/05.jpg (zero bytes)" in printed
    assert len(LatentShards(tmp_path / "out")) == 11


def test_json_is_the_only_output(image_folder, tiny_vae, tmp_path, capsys):
    words = (image_folder, "--vae", tiny_vae, "--size", 16, "--out", tmp_path / "out", "--shard-size", 5, "--json")
    run(*words, "--workers", 0, "--no-flip", "--dtype", "float32")
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["num_samples"], result["num_shards"], result["latent_shape"]) == (12, 3, [4, 4, 4])
    assert result["fingerprint"]["has_flip"] is False
    assert captured.err == ""


@pytest.mark.parametrize(
    "words, error, message",
    [
        (("--size", 18), ValueError, "18 is not divisible by the VAE's 4: try 16"),
        (("--num-classes", 2), ValueError, "2 classes"),
        (("--labels", "absent.csv"), FileNotFoundError, "no label file"),
        (("--device", "nonsense"), ValueError, "cannot be used here"),
        (("--batch-size", 0), ValueError, "batch_size is at least 1"),
    ],
)
def test_bad_input_is_one_sentence(words, error, message, image_folder, tiny_vae, tmp_path):
    with pytest.raises(error, match=message) as caught:
        run(image_folder, "--vae", tiny_vae, "--out", tmp_path / "out", "--workers", 0, *words)
    assert "\n" not in str(caught.value)


def test_absent_folders_are_refused(image_folder, tiny_vae, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        run(tmp_path / "absent", "--vae", tiny_vae, "--out", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no VAE at"):
        run(image_folder, "--vae", tmp_path / "absent", "--out", tmp_path / "out")


def write_captions(folder):
    for path in folder.rglob("*.jpg"):
        path.with_suffix(".txt").write_text(f"a picture\nthe picture named {path.stem}")


def test_captions_are_encoded_and_everything_left_out_is_named(image_folder, tiny_vae, tmp_path, capsys):
    write_captions(image_folder)
    (image_folder / "n00000001" / "05.jpg").write_bytes(b"")
    (image_folder / "n00000001" / "06.txt").write_bytes(b"caf\xe9")
    (image_folder / "n00000002" / "11.txt").write_text("w " * 30)
    words = (image_folder, "--vae", tiny_vae, "--size", 16, "--out", tmp_path / "out", "--workers", 0)
    assert run(*words, "--captions", "--text-encoder", "words") == 0
    printed = capsys.readouterr().out
    assert "10 latents of 4 x 4 x 4 in 1 shards" in printed
    assert "19 captions of up to 16 tokens (of 16), 64 wide" in printed
    assert "2 items skipped: n00000001/06.jpg (06.txt is not UTF-8), n00000001/05.jpg (zero bytes)" in printed
    assert "1 caption cut to 16 tokens: n00000002/11.jpg caption 0" in printed
    dataset = CaptionedLatents(tmp_path / "out")
    assert (len(dataset), dataset.fingerprint["has_flip"]) == (10, False)


def test_captions_as_json_continue_and_store_pixels(image_folder, tmp_path, capsys):
    write_captions(image_folder)
    words = (image_folder, "--vae", "pixels", "--size", 8, "--out", tmp_path / "out", "--workers", 0, "--json")
    for kept in (0, 12):
        run(*words, "--captions", image_folder, "--text-encoder", "words:16x8", "--max-tokens", 5, "--flip")
        captured = capsys.readouterr()
        result = json.loads(captured.out)
        assert captured.err == ""
        assert (result["kept"], result["latent_shape"], result["num_captions"]) == (kept, [3, 8, 8], 24)
        assert (result["longest_caption"], result["truncated"]) == (5, [])
        assert result["fingerprint"]["text_encoder"]["max_length"] == 5
        assert result["fingerprint"]["has_flip"] is True


@pytest.mark.parametrize(
    "words, error, message",
    [
        (("--captions",), ValueError, "--captions needs --text-encoder"),
        (("--text-encoder", "words"), ValueError, "are for captions: add --captions"),
        (("--captions", "--text-encoder", "words", "--num-classes", 3), ValueError, "with labels or with captions"),
        (("--captions", "--text-encoder", "words"), ValueError, "no image in .* has a caption"),
        (("--captions", "absent.json", "--text-encoder", "words"), FileNotFoundError, "no captions at absent.json"),
    ],
)
def test_bad_caption_options_are_one_sentence(words, error, message, image_folder, tmp_path):
    with pytest.raises(error, match=message) as caught:
        run(image_folder, "--vae", "pixels", "--size", 8, "--out", tmp_path / "out", "--workers", 0, *words)
    assert "\n" not in str(caught.value)


def test_an_absent_text_encoder_is_refused(image_folder, tmp_path):
    write_captions(image_folder)
    words = (image_folder, "--vae", "pixels", "--size", 8, "--out", tmp_path / "out", "--captions")
    with pytest.raises(FileNotFoundError, match="at /absent/t5"):
        run(*words, "--text-encoder", "/absent/t5")


def test_real_captions_with_taesd_and_the_t5_tokenizer(test_data, tmp_path, capsys):
    from shutil import copy

    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32128, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    annotations = test_data / "coco_mini" / "annotations" / "captions_train2017.json"
    (tmp_path / "images").mkdir()
    for path in sorted((test_data / "coco_mini" / "train2017").iterdir())[:4]:
        copy(path, tmp_path / "images")
    words = (tmp_path / "images", "--vae", test_data / "taesd", "--size", 64, "--out", tmp_path / "out", "--json")
    text = ("--text-encoder", tmp_path / "t5", "--tokenizer", test_data / "tokenizers" / "t5_xxl")
    capsys.readouterr()
    run(*words, "--captions", annotations, *text, "--workers", 0)
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    assert (result["num_samples"], result["num_captions"], result["latent_shape"]) == (4, 20, [4, 8, 8])
    assert len(result["skipped"]) == 76  # images of the annotations that are not in the folder
    dataset = CaptionedLatents(tmp_path / "out")
    assert dataset.caption_shape == (120, 64)
    assert dataset[0]["y"].embeddings.dtype == torch.bfloat16


def test_real_images_with_taesd(test_data, tmp_path, capsys):
    from shutil import copy

    source = test_data / "imagenet_samples"
    names = sorted(path.name for path in source.glob("*.JPEG"))[:3]
    for name in ("labels.csv", *names):
        copy(source / name, tmp_path)
    run(tmp_path, "--vae", test_data / "taesd", "--size", 64, "--out", tmp_path / "out", "--workers", 0, "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["num_samples"], result["latent_shape"]) == (3, [4, 8, 8])
    assert all(0.3 < std < 2 for std in result["statistics"]["std"])
