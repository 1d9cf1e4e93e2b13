import gc
import os
from pathlib import Path

import pytest

from flexidit.clips import ClipSettings, read_clip
from flexidit.draws import Draw, draw_start
from flexidit.images import read_pixels
from flexidit.latents import LatentCodec, PixelCodec
from flexidit.sample_readers import ClipReader, ImageReader
from flexidit.skips import BrokenFileError

SETTINGS = ClipSettings(num_frames=9, size=(16, 24), fps=8.0)


@pytest.fixture
def clip(write_clip, tmp_path):
    return write_clip(tmp_path / "clip.mp4", 20)


def test_images_are_read_as_ever(image_folder):
    path = image_folder / "n00000000" / "00.jpg"
    reader = ImageReader(16)
    assert reader.read(path, Draw(3, 1), seed=2).equal(read_pixels(path, 16))
    assert reader.read(path.read_bytes()).equal(read_pixels(path, 16))
    assert reader.latent_size(PixelCodec()) == (3, 16, 16)


def test_stored_windows_are_the_middle_ones_and_drawn_ones_are_keyed(clip):
    settled, drawing = ClipReader(SETTINGS), ClipReader(SETTINGS, draws_window=True)
    middle = read_clip(clip, SETTINGS)
    assert settled.read(clip, Draw(3, 1), seed=2).equal(middle)
    assert drawing.read(clip).equal(middle)
    for draw in (Draw(3, 1), Draw(3, 2)):
        assert drawing.read(clip.read_bytes(), draw, seed=2).equal(read_clip(clip, SETTINGS, draw_start(2, draw)))
    assert not drawing.read(clip, Draw(3, 1)).equal(drawing.read(clip, Draw(3, 2)))


def test_what_identifies_samples_does_not_depend_on_the_drawn_window():
    fingerprint = ClipReader(SETTINGS).fingerprint
    assert fingerprint == ClipReader(SETTINGS, draws_window=True).fingerprint
    assert (fingerprint["num_frames"], fingerprint["fps"], fingerprint["size"]) == (9, 8.0, [16, 24])
    assert {"image_size", "crop"} == set(ImageReader(16).fingerprint)


def test_latents_of_clips_have_frames(wan_vae, tiny_vae):
    reader = ClipReader(SETTINGS)
    assert reader.latent_size(PixelCodec()) == (3, 9, 16, 24)
    assert reader.latent_size(LatentCodec(wan_vae)) == (4, 3, 4, 6)
    assert reader.latent_size(LatentCodec(tiny_vae)) == (4, 9, 4, 6)


def test_both_kinds_of_damage_are_one_kind_of_error(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for reader in (ImageReader(16), ClipReader(SETTINGS)):
        with pytest.raises(BrokenFileError, match="zero bytes"):
            reader.read(tmp_path / "empty")


def test_no_image_has_no_side():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ImageReader(0)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux does")
def test_reading_a_clip_leaves_no_threads(clip):
    """Forked reading processes wait for ever for the threads of what their parent has not yet collected."""
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/task"))
        ClipReader(SETTINGS).read(clip)
        assert len(os.listdir("/proc/self/task")) == before
    finally:
        gc.enable()
