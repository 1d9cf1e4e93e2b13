"""Captioned clips through ``flexidit encode``."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from flexidit.caption_shards import CaptionedLatents, encode_captioned
from flexidit.captioned_images import find_captioned_clips
from flexidit.clips import ClipSettings, read_clip
from flexidit.latent_encoding import EncodeSettings
from flexidit.latent_metadata import Metadata
from flexidit.latents import LatentCodec
from flexidit.sample_readers import ClipReader
from flexidit.text import make_text_encoder

SETTINGS = ClipSettings(num_frames=9, size=(16, 24), fps=8.0)
SIZES = ("--frames", 9, "--fps", 8, "--size", "16x24")
TEXT = ("--captions", "--text-encoder", "words:8x6")


def run(*words: object) -> int:
    import argparse

    from flexidit.commands import encode

    parser = argparse.ArgumentParser()
    encode.configure(parser)
    return encode.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def encode(clip_folder, wan_vae, tmp_path):
    def call(*words, out=tmp_path / "out"):
        return run(clip_folder, "--vae", wan_vae, "--out", out, "--workers", 0, *TEXT, *words)

    return call


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_encodes_a_folder_of_clips_and_says_what_it_did(encode, clip_folder, wan_vae, tmp_path, capsys):
    assert encode(*SIZES, "--dtype", "float32", "--shard-size", 4) == 0
    assert "6 latents of 4 x 3 x 4 x 6 in 2 shards" in capsys.readouterr().out
    shard, codec = load_file(tmp_path / "out" / "shard-00001.safetensors"), LatentCodec(wan_vae)
    moments = codec.encode_moments(read_clip(clip_folder / "5.mp4", SETTINGS)[None])
    torch.testing.assert_close(shard["mean"][1:], moments.mean)
    torch.testing.assert_close(shard["std"][1:], moments.std)
    metadata = Metadata.load(tmp_path / "out")
    assert {name: metadata.fingerprint[name] for name in ("num_frames", "fps", "size", "has_flip")} == {
        "num_frames": 9, "fps": 8.0, "size": [16, 24], "has_flip": False,
    }  # fmt: skip
    assert metadata.fingerprint["codec"] == codec.fingerprint


def test_statistics_are_by_channel_over_frames_too(encode, tmp_path):
    encode(*SIZES, "--dtype", "float32")
    shard = load_file(tmp_path / "out" / "shard-00000.safetensors")
    mean, variance = shard["mean"].double(), shard["std"].double().square()
    statistics = Metadata.load(tmp_path / "out").statistics()
    by_channel = mean.transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(statistics["mean"]).double(), by_channel.mean(1))
    expected = (by_channel.var(1, correction=0) + variance.transpose(0, 1).flatten(1).mean(1)).sqrt()
    torch.testing.assert_close(torch.tensor(statistics["std"]).double(), expected)


def test_an_interrupted_run_continues_and_ends_with_the_same_files(clip_folder, wan_vae, tmp_path):
    (clip_folder / "2.mp4").write_bytes(b"")
    settings = EncodeSettings(ClipReader(SETTINGS), shard_size=2, batch_size=1, flip=True)

    def encode(out, on_progress=None):
        source, encoder = find_captioned_clips(clip_folder), make_text_encoder("words:8x6")
        return encode_captioned(source, encoder, LatentCodec(wan_vae), tmp_path / out, settings, on_progress)

    def interrupt(done, total):
        if done > 4:
            raise KeyboardInterrupt

    whole = encode("whole")
    with pytest.raises(KeyboardInterrupt):
        encode("out", interrupt)
    assert not Metadata.load(tmp_path / "out").complete
    result = encode("out")
    assert (result.kept, result.encoded) == (3, 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert list(result.skips) == list(whole.skips)


def test_each_kind_of_damage_is_named_in_the_list_of_what_was_skipped(
    clip_kind, clip_kinds, encode, clip_folder, tmp_path
):
    name, reason = clip_kind
    (clip_folder / name).write_bytes(clip_kinds[name])
    (clip_folder / name).with_suffix(".txt").write_text("another")
    encode(*SIZES)
    skips = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [skip["file"] for skip in skips] == ([] if reason is None else [name])
    assert reason is None or re.search(reason, skips[0]["reason"])
    assert len(CaptionedLatents(tmp_path / "out")) == (7 if reason is None else 6)


def test_a_second_run_with_other_frames_is_refused(encode):
    encode(*SIZES)
    with pytest.raises(ValueError, match="num_frames = 9, this run is configured for 5"):
        encode("--frames", 5, "--fps", 8, "--size", "16x24")
    with pytest.raises(ValueError, match="fps = 8.0, this run is configured for None"):
        encode("--frames", 9, "--fps", "all", "--size", "16x24")


def test_clips_are_recognised_and_a_square_is_one_number(encode, tmp_path):
    encode("--frames", 9, "--fps", "all", "--size", 16, "--json")
    metadata = Metadata.load(tmp_path / "out")
    assert (metadata.latent_shape, metadata.fingerprint["fps"]) == ([4, 3, 4, 4], None)


def test_frames_pick_the_clips_among_images(encode, image_folder, clip_folder, tmp_path):
    (clip_folder / "a.jpg").write_bytes((image_folder / "n00000000" / "00.jpg").read_bytes())
    encode(*SIZES)
    assert len(CaptionedLatents(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    "words, message",
    [
        (("--frames", 10, "--fps", 8, "--size", "16x24"), "clips of 10 frames do not fit the VAE.*: try 9"),
        (("--frames", 9, "--fps", 8, "--size", "16x23"), "16x23 is not divisible by the VAE's 4: try 16x20"),
        (("--frames", 9, "--fps", 8, "--size", "16x"), "'16x' is no size"),
        (("--frames", 9, "--fps", "many"), "--fps 'many' is no number"),
        (("--frames", 9, "--fps", 0), "fps must be positive"),
        (("--frames", 0), "at least, got 0 frames"),
        (("--frames", 49, "--fps", 8, "--size", 16), "none of the 6 clips could be read .*too short"),
    ],
)
def test_bad_input_is_one_sentence(words, message, encode):
    with pytest.raises(ValueError, match=message) as caught:
        encode(*words)
    assert "\n" not in str(caught.value)


def test_options_of_the_other_kind_are_refused(clip_folder, image_folder, wan_vae, tmp_path):
    out = ("--out", tmp_path / "out", "--workers", 0)
    with pytest.raises(ValueError, match="clips are encoded with captions"):
        run(clip_folder, "--vae", wan_vae, *out)
    with pytest.raises(ValueError, match="--fps is for clips: add --frames"):
        run(image_folder, "--vae", "pixels", "--fps", 8, *out)
    with pytest.raises(ValueError, match="cropped to squares"):
        run(image_folder, "--vae", "pixels", "--size", "16x24", *out)
    with pytest.raises(ValueError, match="for clips and not for images"):
        run(image_folder, "--vae", wan_vae, "--size", 16, *out)
    with pytest.raises(FileNotFoundError, match="no folder of clips"):
        run(tmp_path / "absent", "--vae", wan_vae, "--frames", 9, *TEXT, *out)


@pytest.mark.parametrize("name, shape", [("tiny_vae", [4, 9, 4, 6]), ("cogvideox_vae", [4, 3, 4, 6])])
def test_other_vaes_of_clips_and_of_images(name, shape, clip_folder, request, tmp_path):
    vae = request.getfixturevalue(name)
    run(clip_folder, "--vae", vae, "--out", tmp_path / "out", "--workers", 1, "--tiling", *TEXT, *SIZES)
    assert Metadata.load(tmp_path / "out").latent_shape == shape


def test_real_clips_through_a_small_wan_vae(test_data, wan_vae, tmp_path, capsys):
    names = sorted(path.name for path in (test_data / "videos").iterdir() if path.suffix in (".mp4", ".mkv", ".gif"))
    lines = [{"file_name": name, "text": f"a clip named {name.split('.')[0]}"} for name in names]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join(map(json.dumps, lines)))
    text = ("--captions", captions, "--text-encoder", "words")
    sizes = ("--frames", 17, "--fps", 8, "--size", "32x48")
    run(test_data / "videos", "--vae", wan_vae, "--out", tmp_path / "out", "--workers", 0, *text, *sizes)
    assert "5 latents of 4 x 5 x 8 x 12" in capsys.readouterr().out
    [skip] = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert skip["file"] == "test_video.mp4.gif"
    assert skip["reason"].startswith("too short: 2.00 s")
    dataset = CaptionedLatents(tmp_path / "out")
    assert torch.stack([dataset[index]["x"] for index in range(5)]).isfinite().all()
