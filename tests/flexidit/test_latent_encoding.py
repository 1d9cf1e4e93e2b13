import gc
import json
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file

from flexidit.images import find_images, read_pixels
from flexidit.latent_encoding import EncodeSettings, encode_images
from flexidit.latent_metadata import Metadata
from flexidit.latent_shards import sha256_of
from flexidit.latents import LatentCodec
from flexidit.sample_readers import ImageReader
from flexidit.skips import BrokenFileError

SETTINGS = EncodeSettings(ImageReader(16), shard_size=5, batch_size=2, dtype="float32")


def encode(folder, vae, out, settings=SETTINGS, **options):
    return encode_images(find_images(folder), LatentCodec(vae, batch_size=2), out, settings, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_rows_are_the_moments_of_the_image_and_of_its_mirror_image(image_folder, kl_vae, tmp_path):
    encode(image_folder, kl_vae, tmp_path / "out")
    images, codec = find_images(image_folder), LatentCodec(kl_vae)
    shard = load_file(tmp_path / "out" / "shard-00001.safetensors")
    pixels = read_pixels(images.path(6), 16)[None]
    for suffix, view in (("", pixels), ("_flip", pixels.flip(-1))):
        moments = codec.encode_moments(view)
        torch.testing.assert_close(shard["mean" + suffix][1:2], moments.mean)
        torch.testing.assert_close(shard["std" + suffix][1:2], moments.std)
    assert (int(shard["index"][1]), int(shard["label"][1])) == (6, 1)


def test_names_stand_beside_the_rows(image_folder, tiny_vae, tmp_path):
    encode(image_folder, tiny_vae, tmp_path / "out")
    lines = (tmp_path / "out" / "shard-00002.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"index": 10, "file": "n00000002/10.jpg", "label": 2}


def test_an_interrupted_run_continues_and_ends_with_the_same_files(image_folder, tiny_vae, tmp_path):
    encode(image_folder, tiny_vae, tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if done > 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(image_folder, tiny_vae, tmp_path / "out", on_progress=interrupt)
    assert not Metadata.load(tmp_path / "out").complete
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    result = encode(image_folder, tiny_vae, tmp_path / "out")
    assert (result.kept, result.encoded) == (5, 7)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_run_has_nothing_to_do(image_folder, tiny_vae, tmp_path):
    encode(image_folder, tiny_vae, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert encode(image_folder, tiny_vae, tmp_path / "out").encoded == 0
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[:-1] + b"?"])
def test_damaged_shards_are_encoded_again(damage, image_folder, tiny_vae, tmp_path):
    encode(image_folder, tiny_vae, tmp_path / "out")
    before = contents(tmp_path / "out")
    path = tmp_path / "out" / "shard-00001.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert encode(image_folder, tiny_vae, tmp_path / "out").encoded == 5
    assert contents(tmp_path / "out") == before


def test_broken_images_are_named_counted_and_left_out(image_folder, tiny_vae, tmp_path):
    (image_folder / "n00000001" / "04.jpg").write_bytes(b"")
    cut = image_folder / "n00000001" / "05.jpg"
    cut.write_bytes(cut.read_bytes()[:700])
    result = encode(image_folder, tiny_vae, tmp_path / "out")
    assert result.metadata.num_samples == 10
    assert [skip.name for skip in result.skips] == ["n00000001/04.jpg", "n00000001/05.jpg"]
    again = encode(image_folder, tiny_vae, tmp_path / "out")
    assert list(again.skips) == list(result.skips)


def test_a_shard_of_broken_images_is_empty_and_readable(image_folder, tiny_vae, tmp_path):
    from flexidit.latent_shards import LatentShards

    for number in range(5, 10):
        (image_folder / f"n0000000{number // 4}" / f"{number:02d}.jpg").write_bytes(b"")
    result = encode(image_folder, tiny_vae, tmp_path / "out")
    assert result.metadata.num_samples == 7
    assert LatentShards(tmp_path / "out").indices.tolist() == [0, 1, 2, 3, 4, 10, 11]


def test_only_broken_images_are_refused(image_folder, tiny_vae, tmp_path):
    for path in image_folder.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 12 images could be read .*not an image"):
        encode(image_folder, tiny_vae, tmp_path / "out")


def test_a_folder_of_other_latents_is_refused(image_folder, tiny_vae, kl_vae, tmp_path):
    encode(image_folder, tiny_vae, tmp_path / "out")
    with pytest.raises(ValueError, match=r"codec\.class = 'AutoencoderTiny'"):
        encode(image_folder, kl_vae, tmp_path / "out")
    with pytest.raises(ValueError, match="shard_size = 5, this run is configured for 6"):
        encode(image_folder, tiny_vae, tmp_path / "out", EncodeSettings(ImageReader(16), 6, 2, "float32"))
    (image_folder / "n00000000" / "00.jpg").unlink()
    with pytest.raises(ValueError, match="num_images = 12"):
        encode(image_folder, tiny_vae, tmp_path / "out")


def test_workers_and_batches_change_nothing(image_folder, tiny_vae, tmp_path):
    encode(image_folder, tiny_vae, tmp_path / "a")
    encode(image_folder, tiny_vae, tmp_path / "b", EncodeSettings(ImageReader(16), 5, 4, "float32", num_workers=1))
    a, b = (load_file(tmp_path / name / "shard-00001.safetensors") for name in "ab")
    torch.testing.assert_close(a, b)


def test_half_precision_and_no_flip(image_folder, kl_vae, tmp_path):
    encode(image_folder, kl_vae, tmp_path / "out", EncodeSettings(ImageReader(16), dtype="bfloat16", flip=False))
    shard = load_file(tmp_path / "out" / "shard-00000.safetensors")
    assert set(shard) == {"mean", "std", "index", "label"}
    assert shard["mean"].dtype == torch.bfloat16


def test_metadata_lists_size_and_hash(image_folder, tiny_vae, tmp_path):
    metadata = encode(image_folder, tiny_vae, tmp_path / "out").metadata
    assert Metadata.load(tmp_path / "out") == metadata
    for entry in metadata.entries():
        path = tmp_path / "out" / entry.file
        assert (entry.bytes, entry.sha256) == (path.stat().st_size, sha256_of(path))
    assert [entry.count for entry in metadata.entries()] == [5, 5, 2]


@pytest.mark.parametrize("options", [{"shard_size": 0}, {"batch_size": -1}, {"dtype": "int8"}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        EncodeSettings(**options)


class Ring:
    """Garbage that only the cycle collector finds, as a closed video file is."""

    def __init__(self) -> None:
        self.itself = self


@dataclass(frozen=True)
class WatchingReader(ImageReader):
    """Reads nothing while something of the main process, which should be gone, is alive."""

    watched: weakref.ref[Ring] | None = None

    def read(self, source, draw=None, seed=0):
        if self.watched and self.watched():
            raise BrokenFileError("garbage was inherited")
        return super().read(source)


def test_workers_inherit_no_garbage(image_folder, tiny_vae, tmp_path):
    """A worker that collects a video encoder of the main process waits for ever for threads that it has not got."""
    gc.disable()
    try:
        reader = WatchingReader(16, weakref.ref(Ring()))
        settings = replace(SETTINGS, reader=reader, num_workers=1)
        assert reader.watched() is not None
        result = encode(image_folder, tiny_vae, tmp_path / "out", settings)
    finally:
        gc.enable()
    assert not len(result.skips)
