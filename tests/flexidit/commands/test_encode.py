import argparse
import json

import pytest

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
