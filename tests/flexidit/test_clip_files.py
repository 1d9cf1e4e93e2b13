"""Clips that are written, read back."""

from fractions import Fraction
from io import BytesIO

import av
import pytest
import torch
from PIL import Image

from flexidit.clip_files import CLIP_FORMATS, encode_clip
from flexidit.clips import ClipSettings, probe_clip, read_clip


def smooth_clip(num_frames=12, size=(32, 48), channels=3, seed=0):
    """(C, F, H, W) in [-1, 1], whose colours change smoothly in space and time."""
    corners = torch.rand(1, channels, 2, 3, 4, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8
    sizes = (num_frames, *size)
    return torch.nn.functional.interpolate(corners, sizes, mode="trilinear", align_corners=True)[0]


@pytest.mark.parametrize("clip_format, tolerance", [("mp4", 0.05), ("gif", 0.09)])
@pytest.mark.parametrize("size", [(32, 48), (31, 47), (16, 17)])
def test_frames_come_back(clip_format, tolerance, size):
    """Up to compression, and to the 256 colours of a gif; in their order, and odd sides whole."""
    clip = smooth_clip(size=size)
    read = read_clip(encode_clip(clip, clip_format, 8), ClipSettings(12, padded(size, clip_format)))
    read = read[:, :, : size[0], : size[1]]
    assert (read - clip).abs().mean() < tolerance
    distances = (read[:, :, None] - clip[:, None]).abs().mean((0, 3, 4))
    assert distances.argmin(0).tolist() == distances.argmin(1).tolist() == list(range(12))


def padded(size, clip_format):
    """4:2:0 has no odd sides."""
    return tuple(side + side % 2 if clip_format == "mp4" else side for side in size)


@pytest.mark.parametrize("size", [(31, 48), (32, 47), (31, 47)])
def test_an_odd_side_gets_a_copy_of_its_last_line(size):
    read = read_clip(encode_clip(smooth_clip(size=size), "mp4", 8), ClipSettings(12, (32, 48)))
    torch.testing.assert_close(read[..., -1, :], read[..., -2, :], atol=0.12, rtol=0)
    torch.testing.assert_close(read[..., -1], read[..., -2], atol=0.12, rtol=0)


@pytest.mark.parametrize("clip_format", CLIP_FORMATS)
def test_one_frame_of_one_pixel_is_a_clip(clip_format):
    clip = torch.full((3, 1, 1, 1), 0.4)
    read = read_clip(encode_clip(clip, clip_format, 8), ClipSettings(1, padded((1, 1), clip_format)))
    torch.testing.assert_close(read, clip.expand_as(read), atol=0.05, rtol=0)


@pytest.mark.parametrize("fps", [1, 7.5, 8, 12, 16, 24, 25, 30000 / 1001])
@pytest.mark.parametrize("clip_format", CLIP_FORMATS)
def test_a_clip_lasts_as_long_as_it_should(clip_format, fps):
    info = probe_clip(encode_clip(smooth_clip(24), clip_format, fps))
    assert info.num_frames == 24
    assert info.duration == pytest.approx(24 / fps, abs=0.0051 if clip_format == "gif" else 0.001)


@pytest.mark.parametrize("fps", [60, 120])
def test_a_gif_is_not_faster_than_browsers_show_it(fps):
    """Frames of less than 2 hundredths of a second are shown for 10 of them."""
    with Image.open(BytesIO(encode_clip(smooth_clip(6), "gif", fps))) as picture:
        durations = []
        for place in range(picture.n_frames):
            picture.seek(place)
            durations.append(picture.info["duration"])
    assert durations == [20] * 6


def test_a_gif_repeats_for_ever():
    with Image.open(BytesIO(encode_clip(smooth_clip(), "gif", 8))) as picture:
        assert (picture.info["loop"], picture.n_frames) == (0, 12)


@pytest.mark.parametrize("clip_format", CLIP_FORMATS)
def test_frames_that_do_not_change_are_kept(clip_format):
    """Of a still clip all frames are written, or their time is: it lasts as long as one that moves."""
    still = smooth_clip(1).expand(-1, 12, -1, -1)
    info = probe_clip(encode_clip(still, clip_format, 8))
    assert info.duration == pytest.approx(12 / 8, abs=0.006)


@pytest.mark.parametrize("clip_format", CLIP_FORMATS)
def test_one_channel_is_grey(clip_format):
    clip = smooth_clip(channels=1)
    read = read_clip(encode_clip(clip, clip_format, 8), ClipSettings(12, (32, 48)))
    assert (read - clip).abs().mean() < 0.03
    assert (read - read.mean(0)).abs().max() < 0.05


@pytest.mark.parametrize("clip_format", CLIP_FORMATS)
def test_values_outside_the_range_are_clipped(clip_format):
    clip = smooth_clip()
    assert encode_clip(clip * 4, clip_format, 8) == encode_clip((clip * 4).clamp(-1, 1), clip_format, 8)


@pytest.mark.parametrize("clip_format", CLIP_FORMATS)
@pytest.mark.parametrize("size", [(32, 48), (16, 16), (64, 64)])
def test_a_clip_is_always_the_same_file(clip_format, size):
    clip = smooth_clip(size=size)
    assert len({encode_clip(clip, clip_format, 8) for _ in range(12)}) == 1


def test_mp4_is_of_the_form_that_players_read():
    with av.open(BytesIO(encode_clip(smooth_clip(), "mp4", 8))) as container:
        [stream] = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(8)


@pytest.mark.parametrize(
    "shape, clip_format, fps, message",
    [
        ((3, 4, 8, 8), "webm", 8, "written as mp4 or gif, not as 'webm'"),
        ((3, 8, 8), "mp4", 8, r"has shape \(1 or 3, F, H, W\), got \(3, 8, 8\)"),
        ((4, 4, 8, 8), "gif", 8, r"got \(4, 4, 8, 8\)"),
        ((3, 0, 8, 8), "mp4", 8, r"got \(3, 0, 8, 8\)"),
        ((3, 4, 8, 8), "mp4", 0, "between 0 and 1000 frames per second, got 0"),
        ((3, 4, 8, 8), "gif", float("nan"), "got nan"),
    ],
)
def test_what_is_no_clip_is_refused(shape, clip_format, fps, message):
    with pytest.raises(ValueError, match=message):
        encode_clip(torch.zeros(shape), clip_format, fps)
