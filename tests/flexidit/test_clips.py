"""What is read of a video that is whole: which frames, upright, cropped."""

import struct
from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest
import torch
from PIL import Image

from flexidit.clips import BrokenClipError, ClipSettings, probe_clip, read_clip
from flexidit.draws import Draw, draw_start
from flexidit.sample_readers import ClipReader

SIZE = (32, 48)
LOSSLESS = {
    "mkv": ("ffv1", "bgr0", {}),
    "avi": ("ffv1", "bgr0", {}),
    "mov": ("png", "rgb24", {}),
    "mp4": ("libx264rgb", "rgb24", {"qp": "0", "g": "6", "bf": "2"}),  # key frames, and frames out of order
}
IRREGULAR = [0, 10, 12, 30, 33, 60, 61, 62, 63, 90, 120, 121, 150, 151, 152, 153, 190, 200, 240, 250]  # hundredths


@pytest.fixture(params=LOSSLESS)
def write_lossless(request, write_video, tmp_path):
    codec, pix_fmt, codec_options = LOSSLESS[request.param]

    def write(frames, **options):
        return write_video(tmp_path / f"clip.{request.param}", frames, codec, pix_fmt, **codec_options, **options)

    return write


def as_bytes(pixels):
    """(3, F, H, W) in [-1, 1] -> (F, H, W, 3) uint8, exactly."""
    values = (pixels + 1) * 127.5
    assert (values - values.round()).abs().max() < 1e-4
    return values.round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def places(pixels, frames):
    """Which of some different frames a clip shows."""
    return [int(np.flatnonzero((frames == shown).all((1, 2, 3)))[0]) for shown in as_bytes(pixels)]


@pytest.mark.parametrize("start", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_frames_as_stored_come_back_exactly(start, write_lossless, noise_frames):
    path = write_lossless(noise_frames)
    pixels = read_clip(path, ClipSettings(7, SIZE), start)
    first = min(floor(start * 14), 13)
    assert (as_bytes(pixels) == noise_frames[first : first + 7]).all()
    assert (pixels.dtype, pixels.min(), pixels.max()) == (torch.float32, -1, 1)
    assert pixels.is_contiguous()


def test_a_whole_clip_has_one_window(write_lossless, noise_frames):
    path = write_lossless(noise_frames)
    for fps in (None, 10.0):
        for start in (0.0, 0.5, 1.0):
            assert (as_bytes(read_clip(path, ClipSettings(20, SIZE, fps), start)) == noise_frames).all()


def test_content_is_read_as_a_file_is(write_lossless, noise_frames):
    path, settings = write_lossless(noise_frames), ClipSettings(5, SIZE, 7.0)
    assert read_clip(path.read_bytes(), settings, 0.7).equal(read_clip(path, settings, 0.7))


@pytest.mark.parametrize("fps", [4.0, 10.0, 24.0])
@pytest.mark.parametrize("times", [list(range(0, 200, 10)), IRREGULAR], ids=["constant rate", "variable rate"])
@pytest.mark.parametrize("start", [0.0, 0.4, 1.0])
def test_each_frame_is_the_last_whose_time_has_come(fps, times, start, write_lossless, noise_frames):
    if write_lossless(noise_frames[:1]).suffix == ".avi" and times is IRREGULAR:
        pytest.skip("avi has no times")
    path = write_lossless(noise_frames, rate=100, times=times)
    seconds = [Fraction(time, 100) for time in times]
    shown = places(read_clip(path, ClipSettings(6, SIZE, fps), start), noise_frames)
    wanted = [seconds[shown[0]] + step / Fraction(fps) for step in range(6)]
    assert shown == [max(i for i, time in enumerate(seconds) if time <= want) for want in wanted]


def test_windows_are_a_pure_function_of_their_start_and_cover_the_clip(write_lossless, noise_frames):
    path, settings = write_lossless(noise_frames), ClipSettings(5, SIZE, 10.0)
    starts = [step / 32 for step in range(33)]
    firsts = [places(read_clip(path, settings, start), noise_frames)[0] for start in starts]
    assert all(before <= after for before, after in pairwise(firsts))
    assert sorted(set(firsts)) == list(range(16))
    assert firsts == [places(read_clip(path, settings, start), noise_frames)[0] for start in starts]


def test_the_window_is_the_middle_one_if_nobody_draws_it(write_video, noise_frames, tmp_path):
    path, settings = write_video(tmp_path / "clip.mkv", noise_frames), ClipSettings(6, SIZE, 10.0)
    assert places(read_clip(path, settings), noise_frames) == list(range(7, 13))
    assert read_clip(path, settings).equal(read_clip(path, settings, 0.5))


def test_drawn_windows_depend_on_seed_epoch_and_clip_only(write_video, noise_frames, tmp_path):
    path, settings = write_video(tmp_path / "clip.mkv", noise_frames), ClipSettings(4, SIZE, 10.0)
    drawn, fixed = ClipReader(settings, draws_window=True), ClipReader(settings)
    seen = set()
    for seed, sample, epoch in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2), (0, 2, 0)]:
        pixels = drawn.read(path, Draw(sample, epoch), seed)
        assert pixels.equal(read_clip(path, settings, draw_start(seed, Draw(sample, epoch))))
        assert fixed.read(path, Draw(sample, epoch), seed).equal(read_clip(path, settings))
        seen.add(places(pixels, noise_frames)[0])
    assert len(seen) > 2


def with_matrix(video, a, b, c, d):
    """An mp4 with this display matrix in the header of its track."""
    begin = video.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return video[:begin] + matrix + video[begin + len(matrix) :]


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_rotated_clips_are_turned_upright(quarters, is_mirrored, write_video, noise_frames, tmp_path):
    """The matrix of a clip that is to be mirrored (or not), then turned clockwise."""
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][quarters]
    video = write_video(tmp_path / "clip.mp4", noise_frames, "libx264rgb", "rgb24", qp="0").read_bytes()
    turned = with_matrix(video, *((-a, -b) if is_mirrored else (a, b)), c, d)
    stored = noise_frames[:, :, ::-1] if is_mirrored else noise_frames
    upright = np.rot90(stored, -quarters, axes=(1, 2))
    assert (as_bytes(read_clip(turned, ClipSettings(20, upright.shape[1:3]))) == upright).all()
    info = probe_clip(turned)
    assert info.size == upright.shape[1:3]
    assert is_mirrored or info.rotation == 90 * quarters


@pytest.mark.parametrize("size", [(16, 16), (20, 40), (40, 20), (64, 96), (7, 11)])
def test_the_largest_central_part_is_resampled(size, write_video, noise_frames, tmp_path):
    path = write_video(tmp_path / "clip.mkv", noise_frames)
    scale = min(32 / size[0], 48 / size[1])
    height, width = size[0] * scale, size[1] * scale
    box = ((48 - width) / 2, (32 - height) / 2, (48 + width) / 2, (32 + height) / 2)
    shown = as_bytes(read_clip(path, ClipSettings(20, size)))
    for array, frame in zip(shown, noise_frames, strict=True):
        picture = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC, box=box)
        np.testing.assert_array_equal(array, np.asarray(picture))


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2)])
def test_pixels_are_made_square(aspect, write_video, noise_frames, tmp_path):
    """A clip whose pixels are twice as wide as high covers a picture twice as wide, and nothing is cut off."""
    path = write_video(tmp_path / "clip.mp4", noise_frames, "libx264rgb", "rgb24", aspect=aspect, qp="0")
    size = (32, 96) if aspect > 1 else (64, 48)
    shown = as_bytes(read_clip(path, ClipSettings(20, size)))
    for array, frame in zip(shown, noise_frames, strict=True):
        np.testing.assert_array_equal(array, np.asarray(Image.fromarray(frame).resize(size[::-1])))


@pytest.mark.parametrize(
    "num_frames, fps, reason",
    [
        (21, None, "too short: 20 frames, 21 are needed"),
        (21, 10.0, "too short: 2.00 s, 21 frames at 10 fps need 2.10 s"),
        (81, 16.0, "too short: 2.00 s, 81 frames at 16 fps need 5.06 s"),
    ],
)
def test_a_short_clip_says_how_long_it_is_and_how_long_it_should_be(
    num_frames, fps, reason, write_lossless, noise_frames
):
    with pytest.raises(BrokenClipError) as caught:
        read_clip(write_lossless(noise_frames), ClipSettings(num_frames, SIZE, fps))
    assert str(caught.value) == reason


@pytest.mark.parametrize("times", [list(range(20)), [0, 1, 2, 10, 11, 12, *range(20, 34)]])
def test_probe_says_what_a_clip_is(times, write_lossless, noise_frames):
    path = write_lossless(noise_frames, times=times)
    info = probe_clip(path)
    is_avi = path.suffix == ".avi"
    assert (info.num_frames, info.size, info.rotation) == (20, SIZE, 0)
    assert is_avi or info.duration == pytest.approx((times[-1] + 1) / 10, abs=0.002)
    assert info.fps == pytest.approx(info.num_frames / info.duration)


@pytest.mark.parametrize("name", ["a:b.mkv", "file:x.mkv", "http:x.mkv", "%03d.mkv", "a b\u00e9.mkv", "-i.mkv"])
def test_names_are_names_and_no_addresses(name, write_video, noise_frames, tmp_path):
    path = write_video(tmp_path / "clip.mkv", noise_frames).rename(tmp_path / name)
    assert (as_bytes(read_clip(path, ClipSettings(20, SIZE))) == noise_frames).all()


@pytest.mark.parametrize(
    "options", [{"num_frames": 0}, {"size": (0, 4)}, {"fps": 0.0}, {"fps": -1.0}, {"fps": float("inf")}]
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="got "):
        ClipSettings(**{"num_frames": 4, "size": (4, 4), **options})
