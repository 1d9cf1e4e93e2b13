"""Written clips are read back as they were: frames, their number, their rate, their size."""

from __future__ import annotations

from io import BytesIO

import av
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from flexidit.clip_files import encode_clip
from flexidit.pictures import to_image


def a_clip(channels: int = 3, frames: int = 6, height: int = 48, width: int = 64) -> Tensor:
    """Smooth, and different in every frame."""
    small = torch.rand(1, channels, frames, 3, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(small, (frames, height, width), mode="trilinear")[0]


def frames_of(content: bytes) -> Tensor:
    """(F, H, W, 3) of an mp4."""
    with av.open(BytesIO(content)) as file:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)])


def levels(clip: Tensor) -> Tensor:
    """(F, H, W, 3) as pictures have them."""
    frames = [torch.frombuffer(bytearray(to_image(frame).tobytes()), dtype=torch.uint8) for frame in clip.unbind(1)]
    return torch.stack(frames).view(clip.shape[1], *clip.shape[2:], 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_shows_every_frame(channels: int) -> None:
    clip = a_clip(channels)
    read = frames_of(encode_clip(clip, "mp4", 8))
    assert read.shape == (6, 48, 64, 3)
    errors = (read.float() - levels(clip).float()).abs().mean((1, 2, 3))
    assert errors.max() < 4  # its colours have half the resolution
    assert (read.float() - levels(clip).roll(1, 0).float()).abs().mean() > 2 * errors.mean()


def test_colours_are_kept_and_named() -> None:
    colour = torch.tensor([0.7, -0.8, -0.5])
    content = encode_clip(colour.view(3, 1, 1, 1).expand(3, 4, 32, 32), "mp4", 8)
    with av.open(BytesIO(content)) as file:
        frame = next(file.decode(video=0))
    assert frame.colorspace == frame.color_range == 1
    assert (torch.from_numpy(frame.to_ndarray(format="rgb24"))[9, 9] - (colour + 1) * 127.5).abs().max() < 4


@pytest.mark.parametrize("fps", [8, 12.5, 24, 23.976])
def test_the_rate_is_kept(fps: float) -> None:
    with av.open(BytesIO(encode_clip(a_clip(), "mp4", fps))) as file:
        assert float(file.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-4)
    gif = Image.open(BytesIO(encode_clip(a_clip(frames=48), "gif", fps)))
    durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert sum(durations) == pytest.approx(1000 * 48 / fps, abs=10)


def test_gif_repeats_and_shows_every_frame() -> None:
    clip = a_clip(1)
    gif = Image.open(BytesIO(encode_clip(clip, "gif", 10)))
    assert gif.n_frames == 6 and gif.info["loop"] == 0
    read = [
        torch.frombuffer(bytearray(f.convert("RGB").tobytes()), dtype=torch.uint8) for f in ImageSequence.Iterator(gif)
    ]
    assert (torch.stack(read).float() - levels(clip).flatten(1).float()).abs().max() <= 2


def test_odd_sides_get_a_copy_of_their_last_line() -> None:
    read = frames_of(encode_clip(torch.zeros(3, 4, 15, 17), "mp4", 8))
    assert read.shape == (4, 16, 18, 3)
    assert (read.int() - read[0, 0, 0, 0].int()).abs().max() <= 2


@pytest.mark.parametrize(
    ("clip", "clip_format", "fps", "sentence"),
    [
        (torch.zeros(3, 4, 16, 16), "webm", 8, "mp4 or gif, not as 'webm'"),
        (torch.zeros(2, 4, 16, 16), "mp4", 8, r"got \(2, 4, 16, 16\)"),
        (torch.zeros(3, 16, 16), "gif", 8, r"got \(3, 16, 16\)"),
        (torch.zeros(3, 4, 16, 16), "gif", 0, "between 0 and 1000"),
        (torch.zeros(3, 4, 16, 16), "mp4", float("nan"), "between 0 and 1000"),
    ],
)
def test_refusals(clip: Tensor, clip_format: str, fps: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        encode_clip(clip, clip_format, fps)
