"""Clips as files that people can open: mp4 for players, gif for pages and notes.

Shape legend: C channels (1 or 3), F frames, H W height and width in pixels. Pixels are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from flexidit.pictures import to_image

if TYPE_CHECKING:
    from PIL import Image

CLIP_FORMATS = ("mp4", "gif")
_QUALITY = "16"  # x264's constant rate factor: 0 is lossless, from about 17 on one can tell


def encode_clip(pixels: Tensor, clip_format: str, fps: float) -> bytes:
    """Content of a file: (C, F, H, W) in ``"mp4"`` or ``"gif"``.

    Raises:
        ValueError: another format, pixels of another shape, or no frame rate.
    """
    if clip_format not in CLIP_FORMATS:
        raise ValueError(f"clips are written as {' or '.join(CLIP_FORMATS)}, not as {clip_format!r}")
    if pixels.ndim != 4 or pixels.shape[0] not in (1, 3) or not pixels.numel():
        raise ValueError(f"a clip has shape (1 or 3, F, H, W), got {tuple(pixels.shape)}")
    frames = [to_image(frame) for frame in pixels.unbind(1)]
    return encode_mp4(frames, fps) if clip_format == "mp4" else encode_gif(frames, fps)


def encode_mp4(frames: Sequence[Image.Image], fps: float) -> bytes:
    """H.264 in the form that every player and browser reads: an odd side gets one more line, a copy of its last."""
    import av

    _check_rate(fps)
    buffer = BytesIO()
    width, height = (side + side % 2 for side in frames[0].size)
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": _QUALITY, "x264-params": "mbtree=0"}  # with it, small clips differ from run to run
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(_padded(frame, (width, height)))))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def encode_gif(frames: Sequence[Image.Image], fps: float) -> bytes:
    """A gif that repeats for ever. Its times are hundredths of a second: some rates are met on average only."""
    _check_rate(fps)
    times = [round(100 * place / fps) for place in range(len(frames) + 1)]
    durations = [10 * max(2, end - start) for start, end in pairwise(times)]  # browsers slow down what is faster
    buffer = BytesIO()
    first, *others = frames
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return buffer.getvalue()


def _check_rate(fps: float) -> None:
    if not 0 < fps <= 1000:
        raise ValueError(f"a clip has between 0 and 1000 frames per second, got {fps:g}")


def _padded(frame: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Its last column and row repeated up to a size."""
    from PIL import Image

    width, height = frame.size
    if frame.size == size:
        return frame
    picture = Image.new("RGB", size)
    for x in range(0, size[0], width):
        for y in range(0, size[1], height):
            picture.paste(frame, (x and x - width + 1, y and y - height + 1))
    picture.paste(frame, (0, 0))
    return picture
