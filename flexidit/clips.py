"""Clip files into model pixels: which frames of a video, upright, cropped to one size.

Shape legend: C channels (3), F frames, H W height and width. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import atan2, degrees, floor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexidit.clip_decoding import BrokenClipError, EarlyEndError, Span, TimedFrame, Video, display_matrix, open_video

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = ["CLIP_SUFFIXES", "CROP", "BrokenClipError", "ClipInfo", "ClipSettings", "probe_clip", "read_clip"]

CLIP_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg"})
CROP = "cover_center_bicubic"  # name in fingerprints of what `_crop` does
_JITTER = Fraction(1, 1000)  # containers that round times to milliseconds show a frame up to so much late


@dataclass(frozen=True)
class ClipSettings:
    """What is taken of a video.

    Example:
        >>> ClipSettings(num_frames=16, size=(32, 48), fps=8)
        ClipSettings(num_frames=16, size=(32, 48), fps=8)
    """

    num_frames: int
    """F."""
    size: tuple[int, int]
    """(H, W) of the crop."""
    fps: float | None = None
    """Frames per second; None takes every frame as it is stored."""

    def __post_init__(self) -> None:
        if self.num_frames < 1 or min(self.size) < 1:
            raise ValueError(f"a clip needs a frame and a pixel at least, got {self.num_frames} frames of {self.size}")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps must be positive, or none for the frames as stored, got {self.fps}")


@dataclass(frozen=True)
class ClipInfo:
    """What a video is, as its packets say."""

    duration: float
    """In seconds, the time of the last frame included."""
    fps: float
    """Frames per second on average."""
    num_frames: int
    size: tuple[int, int]
    """(H, W) of the upright picture."""
    rotation: int
    """How far the stored picture is turned clockwise to be upright: 0, 90, 180 or 270 degrees."""


def read_clip(source: Path | bytes, settings: ClipSettings, start: float = 0.5) -> Tensor:
    """A window of a video: (3, F, H, W) in [-1, 1].

    The window begins at a frame, and holds, for every time after it in steps of 1 / fps, the frame that is shown at
    that time: the last one whose presentation time has come, whatever the frame rate of the video, constant or not.
    Only the packets from the key frame before the window to its end are decoded, and only the frames of the window are
    converted and held.

    Each frame is turned upright (as the file's display matrix says), its pixels are made square, and the largest
    central part of the shape H to W is resampled to it with an antialiased bicubic filter.

    Args:
        source: a file, or its content.
        settings: what to take.
        start: where the window lies among those that are possible: 0 is the first, 0.5 the middle, 1 the last.
            Training draws it (:func:`flexidit.draws.draw_start`).

    Raises:
        BrokenClipError: if the video cannot be decoded, or is too short. One that is damaged from some time on is as
            good as one that ends there.
    """
    with open_video(source) as video:
        try:
            begin = _window_start(_span(video, settings), settings, start)
            frames = _window(video, video.frames(begin), settings, begin)
        except EarlyEndError:
            frames = _undamaged_window(video, settings, start)
    pixels = torch.from_numpy(np.stack(frames))  # (F, H, W, 3) uint8
    return pixels.permute(3, 0, 1, 2).float().div_(127.5).sub_(1).contiguous()


def _span(video: Video, settings: ClipSettings) -> Span:
    """What the header says if that is enough to go by, else what the packets say."""
    stated = video.stated_span()
    if (
        stated is not None
        and settings.fps is not None
        and stated.length * Fraction(settings.fps) >= settings.num_frames
    ):
        return stated
    return video.packet_span()


def _undamaged_window(video: Video, settings: ClipSettings, start: float) -> list[np.ndarray]:
    """The window as it lies in that part of the video that can be decoded."""
    span = video.decoded_span()
    if not span.times:
        raise BrokenClipError(f"no frame can be decoded ({span.damage or 'there is none'})")
    begin = _window_start(span, settings, start)
    try:
        return _window(video, video.frames(), settings, begin)  # without seeking, the same frames come again
    except EarlyEndError as error:
        raise BrokenClipError(str(error)) from error


def _window_start(span: Span, settings: ClipSettings, start: float) -> Fraction:
    """Time of the window's first frame, or shortly after it."""
    reason, needed = span.damage or "too short", settings.num_frames
    if settings.fps is None:
        assert span.times is not None
        spare = len(span.times) - needed
        if spare < 0:
            raise BrokenClipError(f"{reason}: {len(span.times)} frames, {needed} are needed")
        return span.times[min(floor(start * (spare + 1)), spare)]
    period = 1 / Fraction(settings.fps)
    if span.length <= (needed - 1) * period:
        lasts, long = f"{float(span.length):.2f} s", f"{float(needed * period):.2f} s"
        raise BrokenClipError(f"{reason}: {lasts}, {needed} frames at {settings.fps:g} fps need {long}")
    return span.first + max(Fraction(0), span.length - needed * period) * Fraction(start)


def _window(video: Video, decoded: Iterator[TimedFrame], settings: ClipSettings, start: Fraction) -> list[np.ndarray]:
    """F frames, (H, W, 3) uint8, from the one that is shown at ``start``."""
    shown = _from(_undamaged(decoded), start)
    chosen = shown if settings.fps is None else _sample(shown, 1 / Fraction(settings.fps))
    frames: list[np.ndarray] = []
    last = None
    for frame in islice(chosen, settings.num_frames):
        frames.append(frames[-1] if frame is last else _crop(frame.image, settings.size, video.pixel_aspect))
        last = frame
    if len(frames) < settings.num_frames:
        raise EarlyEndError(
            f"damaged: {len(frames)} of {settings.num_frames} frames can be decoded from {float(start):.2f} s on"
        )
    return frames


def _undamaged(frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
    with suppress(EarlyEndError):
        yield from frames


def _from(frames: Iterator[TimedFrame], start: Fraction) -> Iterator[TimedFrame]:
    """Leave out the frames that are no longer shown at ``start``."""
    held = None
    for frame in frames:
        if held is not None and frame.time > start + _JITTER:
            yield held
        held = frame
    if held is not None:
        yield held


def _sample(frames: Iterator[TimedFrame], period: Fraction) -> Iterator[TimedFrame]:
    """The frame that is shown at each multiple of ``period`` after the first one's time, until the last one's end."""
    held, wanted = None, Fraction(0)
    for frame in frames:
        if held is None:
            wanted = frame.time
        while held is not None and wanted + _JITTER < frame.time:
            yield held
            wanted += period
        held = frame
    while held is not None and wanted < held.end:
        yield held
        wanted += period


def _crop(frame: VideoFrame, size: tuple[int, int], pixel_aspect: Fraction) -> np.ndarray:
    """The largest central part of the shape H to W, resampled to it: (H, W, 3) uint8.

    One antialiased bicubic step from the stored pixels. ``pixel_aspect`` is the width of a stored pixel to its height.
    """
    from PIL import Image

    is_turned, array = _upright(frame)
    aspect = size[1] / size[0] / float(1 / pixel_aspect if is_turned else pixel_aspect)  # in stored pixels
    height, width = array.shape[:2]
    part_height, part_width = min(height, width / aspect), min(width, height * aspect)
    top, left = (height - part_height) / 2, (width - part_width) / 2
    box = (left, top, left + part_width, top + part_height)
    picture = Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return np.asarray(picture)


def _upright(frame: VideoFrame) -> tuple[bool, np.ndarray]:
    """Whether the picture lies on its side as it is stored, and the picture upright: (H, W, 3) uint8."""
    array = frame.to_ndarray(format="rgb24", threads=1)
    (a, b), (c, d) = display_matrix(frame)
    if abs(a) >= abs(b):
        return False, np.ascontiguousarray(array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    array = array.transpose(1, 0, 2)
    return True, np.ascontiguousarray(array[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1])


def probe_clip(source: Path | bytes) -> ClipInfo:
    """What a video is: reads its packets once, and decodes its first frame.

    Raises:
        BrokenClipError: if it has no frame that can be decoded.
    """
    with open_video(source) as video:
        span = video.packet_span()
        frame = next(_undamaged(video.frames()), None)
        if frame is None or not span.times:
            raise BrokenClipError("no frame can be decoded")
        _, array = _upright(frame.image)
        (a, b), _ = display_matrix(frame.image)
        count = len(span.times)
        rotation = round(degrees(atan2(b, a)) / 90) * 90 % 360
        return ClipInfo(float(span.length), float(count / span.length), count, array.shape[:2], rotation)
