"""``flexidit encode`` of captioned clips."""

import argparse
import json
import shutil

import pytest
import torch

from flexidit.caption_shards import CaptionedLatents
from flexidit.clips import ClipSettings, read_clip
from flexidit.commands import encode
from flexidit.latents import LatentCodec
from flexidit.text import make_text_encoder

SHAPE = ("--frames", 9, "--fps", 8, "--size", "16x24", "--workers", 0)
TEXT = ("--captions", "--text-encoder", "words:8x6")
SETTINGS = ClipSettings(9, (16, 24), 8.0)


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    encode.configure(parser)
    return encode.run(parser.parse_args([str(word) for word in words]))


def run_json(capsys, *words):
    capsys.readouterr()
    assert run(*words, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def damaged_folder(clip_folder, clip_kinds):
    """Six good clips, one of each damaged kind, and captions for all."""
    for name, data in clip_kinds.items():
        (clip_folder / name).write_bytes(data)
        (clip_folder / name).with_suffix(".txt").write_text(f"it is {name}")
    return clip_folder


def test_clips_become_latents_with_captions(clip_folder, wan_vae, tmp_path, capsys):
    out = tmp_path / "out"
    result = run_json(capsys, clip_folder, "--vae", wan_vae, *SHAPE, *TEXT, "--dtype", "float32", "--out", out)
    assert (result["num_samples"], result["num_shards"], result["latent_shape"]) == (6, 1, [4, 3, 4, 6])
    assert (result["num_captions"], result["skipped"], result["truncated"]) == (12, [], [])
    dataset, codec, encoder = CaptionedLatents(out), LatentCodec(wan_vae), make_text_encoder("words:8x6")
    assert dataset.fingerprint["has_flip"] is False  # captions may say left and right
    assert dataset.fingerprint["size"] == [16, 24]
    assert (dataset.fingerprint["num_frames"], dataset.fingerprint["fps"]) == (9, 8.0)
    captions = encoder.encode([f"clip {i} line {line}" for i in range(6) for line in range(2)]).embeddings
    for number in range(6):
        moments = codec.encode_moments(read_clip(clip_folder / f"{number}.mp4", SETTINGS)[None])
        sample = dataset[number]
        assert ((sample["x"] - moments.mean[0]).abs() < 6 * moments.std[0]).all()
        assert any(sample["y"].embeddings.flatten().equal(row.flatten()) for row in captions[2 * number :][:2])


def test_each_damaged_clip_is_named_and_counted(clip_kind, clip_kinds, damaged_folder, tmp_path, capsys):
    name, reason = clip_kind
    out = tmp_path / "out"
    result = run_json(capsys, damaged_folder, "--vae", "pixels", *SHAPE, *TEXT, "--out", out)
    skipped = {item["file"]: item["reason"] for item in result["skipped"]}
    assert (name in skipped) == (reason is not None)
    assert result["num_samples"] + len(skipped) == 6 + len(clip_kinds)
    written = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert written == result["skipped"]
    if reason is not None:
        assert any(part in skipped[name] for part in reason.split("|"))


def test_people_are_told_what_was_left_out(damaged_folder, tmp_path, capsys):
    run(damaged_folder, "--vae", "pixels", *SHAPE, *TEXT, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "latents of 3 x 9 x 16 x 24 in 1 shards" in printed
    assert "5 items skipped: " in printed
    assert f"all of them: {tmp_path / 'out' / 'skipped.jsonl'}" in printed


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_run_continues_and_ends_with_the_same_files(
    num_workers, damaged_folder, wan_vae, tmp_path, capsys, monkeypatch
):
    shape = (*SHAPE[:-1], num_workers, "--shard-size", 4)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_json(capsys, damaged_folder, "--vae", wan_vae, *shape, *TEXT, "--out", whole)
    encode_moments, count = LatentCodec.encode_moments, []

    def interrupted(codec, pixels):
        count.append(len(pixels))
        if len(count) > 6:
            raise KeyboardInterrupt
        return encode_moments(codec, pixels)

    monkeypatch.setattr(LatentCodec, "encode_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(damaged_folder, "--vae", wan_vae, *shape, *TEXT, "--out", out)
    monkeypatch.undo()
    result = run_json(capsys, damaged_folder, "--vae", wan_vae, *shape, *TEXT, "--out", out)
    assert result["kept"] > 0
    assert result["encoded"] > 0
    assert contents(out) == contents(whole)
    with pytest.raises(ValueError, match="num_frames"):
        run(damaged_folder, "--vae", wan_vae, "--frames", 5, *shape[2:], *TEXT, "--out", out)


@pytest.mark.parametrize("name", ["wan_vae", "cogvideox_vae", "kl_vae", "tiny_vae"])
def test_every_vae_takes_clips(name, clip_folder, request, tmp_path, capsys):
    vae, out = request.getfixturevalue(name), tmp_path / "out"
    result = run_json(capsys, clip_folder, "--vae", vae, *SHAPE, *TEXT, "--batch-size", 2, "--out", out)
    assert result["latent_shape"] == ([4, 3, 4, 6] if name in ("wan_vae", "cogvideox_vae") else [4, 9, 4, 6])
    assert all(torch.isfinite(CaptionedLatents(out)[i]["x"]).all() for i in range(6))


def test_frames_are_asked_for_where_a_folder_holds_images_too(clip_folder, image_folder, tmp_path, capsys):
    shutil.copy(next(image_folder.rglob("*.jpg")), clip_folder / "0.jpg")
    words = (clip_folder, "--vae", "pixels", *TEXT, "--workers", 0)
    images = run_json(capsys, *words, "--size", 8, "--out", tmp_path / "images")
    assert images["latent_shape"] == [3, 8, 8]
    clips = run_json(capsys, *words, "--size", 8, "--frames", 5, "--fps", "all", "--out", tmp_path / "clips")
    assert clips["latent_shape"] == [3, 5, 8, 8]
    assert CaptionedLatents(tmp_path / "clips").fingerprint["fps"] is None


@pytest.mark.parametrize(
    "words, message",
    [
        ((*TEXT, "--frames", 10), "clips of 10 frames do not fit the VAE.*try 9"),
        ((*TEXT, "--size", "18x24"), "18x24 is not divisible by the VAE's 4: try 16x24"),
        ((*TEXT, "--size", "16x"), "'16x' is no size: write 256, or 480x832"),
        ((*TEXT, "--size", "16x24x3"), "is no size"),
        ((*TEXT, "--fps", "fast"), "'fast' is no number: write 16, or all"),
        ((*TEXT, "--fps", 0), "fps must be positive"),
        ((*TEXT, "--fps", "nan"), "fps must be positive"),
        ((*TEXT, "--frames", 0), "got 0 frames"),
        ((), "clips are encoded with captions: add --captions and --text-encoder"),
        (("--captions",), "--captions needs --text-encoder"),
        ((*TEXT, "--frames", 81), "none of the 6 clips could be read .*too short"),
    ],
)
def test_bad_options_are_one_sentence(words, message, clip_folder, wan_vae, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        run(clip_folder, "--vae", wan_vae, *SHAPE, *words, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [("--frames", 10), ("--size", "18x24")])
def test_what_does_not_fit_the_vae_is_refused_before_a_bar_appears(words, clip_folder, wan_vae, tmp_path, capfd):
    with pytest.raises(ValueError, match="try"):
        run(clip_folder, "--vae", wan_vae, *SHAPE, *TEXT, *words, "--out", tmp_path / "out")
    assert "encoding" not in capfd.readouterr().err


def test_options_of_clips_are_refused_for_images(image_folder, tmp_path):
    words = (image_folder, "--vae", "pixels", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="--fps is for clips"):
        run(*words, "--fps", 8)
    with pytest.raises(ValueError, match="images are cropped to squares"):
        run(*words, "--size", "8x16")


def test_a_folder_without_clips_is_refused(tmp_path):
    for name in ("empty", "absent"):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(FileNotFoundError, match="no clips in|no folder of clips"):
            run(tmp_path / name, "--vae", "pixels", *SHAPE, *TEXT, "--out", tmp_path / "out")


def test_real_clips_with_a_small_video_vae(test_data, wan_vae, tmp_path, capsys):
    """Six real files of four containers and codecs; the animation is too short for 21 frames at 8 fps."""
    videos = sorted(path for path in (test_data / "videos").iterdir() if path.suffix in (".mp4", ".mkv", ".gif"))
    lines = [{"file_name": path.name, "captions": [f"this is {path.stem}", path.stem]} for path in videos]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = ("--frames", 21, "--fps", 8, "--size", "32x48", "--workers", 0)
    words = (test_data / "videos", "--captions", captions, "--text-encoder", "words:8x6", "--vae", wan_vae, *shape)
    result = run_json(capsys, *words, "--out", tmp_path / "out")
    assert (result["num_samples"], result["num_captions"], result["latent_shape"]) == (5, 10, [4, 6, 8, 12])
    [skipped] = result["skipped"]
    assert skipped == {"file": "test_video.mp4.gif", "reason": "too short: 2.00 s, 21 frames at 8 fps need 2.62 s"}
    assert all(0 < std < 20 for std in result["statistics"]["std"])
