"""Videos of every container, form and damage: read as PyAV reads them plainly, or refused with a reason."""

import re
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from PIL import Image

from flexidit.clips import CLIP_SUFFIXES, BrokenClipError, ClipSettings, probe_clip, read_clip

ALL = ClipSettings(20, (32, 48))
NINE = ClipSettings(9, (32, 40), 8.0)  # what ``clip_kind`` speaks of
CODECS = {
    "mp4": ("libx264", "yuv420p"),
    "mkv": ("libvpx", "yuv420p"),  # not libx265: encoding small frames crashes PyAV 18
    "mov": ("mjpeg", "yuvj420p"),
    "avi": ("mpeg4", "yuv420p"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "mpg": ("mpeg1video", "yuv420p"),
    "m4v": ("mpeg4", "yuv420p"),
    "gif": ("gif", "rgb8"),
}


def as_bytes(pixels):
    """(3, F, H, W) in [-1, 1] -> (F, H, W, 3) uint8."""
    return ((pixels + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


@pytest.fixture
def smooth_frames():
    """Twenty frames of colours that change smoothly: (20, 32, 48, 3) uint8."""
    corners = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    first, last = (np.asarray(Image.fromarray(c).resize((48, 32))).astype(float) for c in corners)
    return np.stack([first + (last - first) * place / 19 for place in range(20)]).astype(np.uint8)


@pytest.mark.parametrize("suffix", CODECS)
def test_every_container_is_read_as_it_is_decoded_plainly(suffix, write_video, decode_plainly, smooth_frames, tmp_path):
    rate = 25 if suffix == "mpg" else 10
    path = write_video(tmp_path / f"clip.{suffix}", smooth_frames, *CODECS[suffix], rate=rate)
    plain = [array for _, array in decode_plainly(path)]
    assert len(plain) == 20
    assert (as_bytes(read_clip(path, ALL)) == plain).all()
    assert (as_bytes(read_clip(path, ClipSettings(6, (32, 48)), 1.0)) == plain[14:]).all()
    assert np.abs(np.stack(plain).astype(float) - smooth_frames).mean() < 25


@pytest.mark.parametrize(
    "codec, pix_fmt",
    [
        ("libx264", "yuv444p"),
        ("libx264", "yuv420p10le"),
        ("libx264", "gray"),
        ("ffv1", "yuv420p12le"),
        ("libvpx-vp9", "yuva420p"),
        ("ffv1", "yuv422p10le"),
    ],
)
def test_depths_and_chroma_are_read_as_they_are_decoded_plainly(
    codec, pix_fmt, write_video, decode_plainly, smooth_frames, tmp_path
):
    path = write_video(tmp_path / "clip.mkv", smooth_frames, codec, pix_fmt)
    plain = [array for _, array in decode_plainly(path)]
    assert (as_bytes(read_clip(path, ALL)) == plain).all()


@pytest.mark.parametrize("size", [(1, 1), (31, 47), (33, 48), (2, 301)])
def test_odd_sizes_come_back_exactly(size, write_video, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (20, *size, 3), dtype=np.uint8)
    path = write_video(tmp_path / "clip.mkv", frames)
    assert (as_bytes(read_clip(path, ClipSettings(20, size))) == frames).all()


def test_every_damage_of_the_list_is_named(clip_kind, clip_kinds, tmp_path):
    """The same of a file and of its content; what can be read all the same is read."""
    name, reason = clip_kind
    path = tmp_path / name
    path.write_bytes(clip_kinds[name])
    for source in (path, clip_kinds[name]):
        if reason is None:
            assert read_clip(source, NINE).shape == (3, 9, 32, 40)
            continue
        with pytest.raises(BrokenClipError, match=reason) as caught:
            read_clip(source, NINE)
        assert "\n" not in str(caught.value)
        assert name not in str(caught.value)  # whoever reads many says which


def test_sound_changes_nothing(write_clip, tmp_path):
    silent, loud = (write_clip(tmp_path / f"{audio}.mp4", 12, audio=audio) for audio in (False, True))
    assert read_clip(loud, NINE).equal(read_clip(silent, NINE))
    assert probe_clip(loud) == probe_clip(silent)


def test_sound_that_lasts_longer_does_not_make_a_clip_longer(write_clip, tmp_path):
    """Seven frames with 30 s of silence: the length of the file is that of the sound."""
    path = tmp_path / "clip.mkv"
    with av.open(str(write_clip(tmp_path / "short.mp4", 7))) as source, av.open(str(path), "w") as container:
        video = container.add_stream_from_template(source.streams.video[0])
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = video
                container.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 240_000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(sound.encode(frame))
    with pytest.raises(BrokenClipError, match=r"0\.8. s, 9 frames at 8 fps need 1\.12 s"):
        read_clip(path, NINE)
    assert read_clip(path, ClipSettings(7, (32, 40), 8.0)).shape == (3, 7, 32, 40)


def test_a_song_with_a_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))))
        container.mux(cover.encode())
    with pytest.raises(BrokenClipError, match="only a cover picture"):
        read_clip(tmp_path / "song.mp4", ALL)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {clip}\n",
    ],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat"])
def test_a_list_of_other_files_is_no_video(text, name, write_clip, tmp_path):
    """A file of unknown origin must not make this process open others."""
    (tmp_path / name).write_text(text.format(clip=write_clip(tmp_path / "clip.mp4", 12)))
    with pytest.raises(BrokenClipError, match="not a video"):
        read_clip(tmp_path / name, NINE)


def test_a_file_that_cannot_be_opened_is_named_broken(tmp_path):
    with pytest.raises(BrokenClipError, match="No such file"):
        read_clip(tmp_path / "absent.mp4", NINE)
    with pytest.raises(BrokenClipError):
        read_clip(tmp_path, NINE)


@pytest.mark.parametrize("suffix", ["mkv", "avi"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_what_lies_before_a_cut_is_as_good_as_a_whole_clip(suffix, share, write_video, noise_frames, tmp_path):
    """The frames of a lossless clip up to the cut come back exactly, the last window included."""
    data = write_video(tmp_path / f"clip.{suffix}", noise_frames).read_bytes()
    cut = data[: int(len(data) * share)]
    num_frames = int(20 * share) - 1
    shown = as_bytes(read_clip(cut, ClipSettings(num_frames, (32, 48)), 0.0))
    assert (shown == noise_frames[:num_frames]).all()
    last = as_bytes(read_clip(cut, ClipSettings(3, (32, 48), 10.0), 1.0))
    [first] = np.flatnonzero((noise_frames == last[0]).all((1, 2, 3)))
    assert (last == noise_frames[first : first + 3]).all()
    with pytest.raises(BrokenClipError, match="cut off|damaged|too short"):
        read_clip(cut, ClipSettings(20, (32, 48), 10.0))


@pytest.mark.parametrize("suffix", [*CODECS])
def test_no_damage_ends_in_another_error(suffix, write_video, smooth_frames, tmp_path):
    """Cut anywhere, or overwritten anywhere: frames of the right shape, or a reason."""
    rate = 25 if suffix == "mpg" else 10
    data = write_video(tmp_path / f"clip.{suffix}", smooth_frames, *CODECS[suffix], rate=rate).read_bytes()
    rng = np.random.default_rng(0)
    for place in np.linspace(1, len(data) - 1, 12).astype(int):
        noise = rng.integers(0, 256, min(40, len(data) - place), dtype=np.uint8).tobytes()
        for broken in (data[:place], data[:place] + noise + data[place + len(noise) :]):
            for settings in (ClipSettings(9, (8, 8), 10.0), ClipSettings(9, (8, 8))):
                read = clip_or_reason(broken, settings)
                assert re.fullmatch(r"[^\n]+", read) if isinstance(read, str) else read.shape == (3, 9, 8, 8)


def clip_or_reason(source, settings, start=0.5):
    try:
        return read_clip(source, settings, start)
    except BrokenClipError as error:
        return str(error)


def real_clips(test_data):
    paths = sorted(path for path in (test_data / "videos").iterdir() if path.suffix in CLIP_SUFFIXES)
    assert len(paths) == 6
    return paths


@pytest.mark.parametrize("number", range(6))
def test_real_clips_are_read_as_they_are_decoded_plainly(number, test_data, decode_plainly):
    """Reference frames of real clips: at the times that are wanted, cropped with Pillow. Two have oblong pixels."""
    path, size = real_clips(test_data)[number], (48, 64)
    with av.open(str(path)) as container:
        aspect = float(container.streams.best("video").sample_aspect_ratio or 1)
    plain = [(time, cropped(array, size, aspect)) for time, array in decode_plainly(path)]
    times = [time for time, _ in plain]
    assert all(before < after for before, after in pairwise(times))
    for fps, start in ((8.0, 0.0), (5.0, 0.5)):
        shown = as_bytes(read_clip(path, ClipSettings(9, size, fps), start))
        begins = [i for i, (_, array) in enumerate(plain) if (array == shown[0]).all()]
        wanted = [times[begins[-1]] + step / Fraction(fps) for step in range(9)]
        chosen = [max(i for i, time in enumerate(times) if time <= want + Fraction(1, 1000)) for want in wanted]
        for array, place in zip(shown, chosen, strict=True):
            np.testing.assert_array_equal(array, plain[place][1])
        assert start or begins[0] == 0


def cropped(array, size, aspect):
    """The largest central part of a picture whose pixels are ``aspect`` times as wide as they are high."""
    height, width = array.shape[:2]
    scale = min(height / size[0], width * aspect / size[1])
    part = (size[1] * scale / aspect, size[0] * scale)
    left, top = (width - part[0]) / 2, (height - part[1]) / 2
    box = (left, top, left + part[0], top + part[1])
    return np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BICUBIC, box=box))


def test_a_real_animation_is_read_as_pillow_reads_it(test_data):
    """Another decoder: the same frames, up to the colours of one palette entry."""
    path = test_data / "videos" / "test_video.mp4.gif"
    frames = []
    with Image.open(path) as picture:
        for place in range(picture.n_frames):
            picture.seek(place)
            frames.append(np.asarray(picture.convert("RGB")))
    shown = as_bytes(read_clip(path, ClipSettings(len(frames), frames[0].shape[:2])))
    np.testing.assert_array_equal(shown, np.stack(frames))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_real_clips_that_are_cut_are_read_up_to_the_cut_or_named(share, test_data, tmp_path):
    settings = ClipSettings(2, (32, 32), 10.0)
    for path in real_clips(test_data):
        cut = tmp_path / path.name
        cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        read = clip_or_reason(cut, settings, 0.0)
        if isinstance(read, str):
            assert re.search("cut off|damaged", read), path
        else:
            assert read.equal(read_clip(path, settings, 0.0)), path


def test_frames_of_an_absurd_size_are_named(write_clip, tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4")
    monkeypatch.setattr("flexidit.clip_decoding._MAX_PIXELS", 40 * 32 - 1)
    with pytest.raises(BrokenClipError, match="frames of 40 x 32 pixels"):
        probe_clip(path)
