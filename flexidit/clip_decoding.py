"""Frames of a video file in the order of presentation, from any time on, and what is damaged in it.

Vocabulary: a *time* is a presentation time in seconds, as an exact fraction; a *span* is what is known of a file
before its frames are decoded: when it begins, when it ends and, if its packets were read, the time of every frame.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flexidit.skips import BrokenFileError

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.sidedata.sidedata import SideData
    from av.video.stream import VideoStream

# Containers that are read. Others are refused because they are no clips (pictures, text), or because they only point
# to other files and addresses (playlists), which a file of unknown origin must not make this process open.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,asf,flv,ogg"
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
Shown = tuple[Fraction, Fraction]  # from when to when
_SHORTFALL = Fraction(1, 2)  # seconds; durations in headers are rounded, and count the sound too
_MAX_PIXELS = 1 << 26  # of a frame: twice those of 8K; a damaged header may ask for any number
_DEFAULT_RATE = Fraction(25)  # of streams that do not say it: only the length of their last frame depends on it


class BrokenClipError(BrokenFileError):
    """A clip that cannot be used; the message is the reason, without the file's name."""


class EarlyEndError(Exception):
    """Frames end before the file said, or cannot be decoded any further; the message is the reason."""


@dataclass(frozen=True)
class Span:
    """From when to when a clip lasts."""

    first: Fraction
    end: Fraction
    """When the last frame is no longer shown."""
    times: tuple[Fraction, ...] | None = None
    """Of all frames, in order; None if only the header was read."""
    damage: str = ""
    """Why the clip ends before its header says; empty if it just ends."""

    @property
    def length(self) -> Fraction:
        """In seconds."""
        return self.end - self.first


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame and when it is shown."""

    time: Fraction
    end: Fraction
    image: VideoFrame


@contextmanager
def open_video(source: Path | bytes) -> Iterator[Video]:
    """The best video stream of a file, or of its content.

    Raises:
        BrokenClipError: if there is none that can be decoded.
    """
    with closing(Video(source)) as video:
        yield video


def _open_container(source: Path | bytes) -> InputContainer:
    import av

    if not _size(source):
        raise BrokenClipError("zero bytes")
    # "file:" keeps names with a colon from being taken for addresses
    place = BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    try:
        return av.open(place, "r", options=_OPTIONS, **_metadata_options())
    except av.FFmpegError as error:
        raise BrokenClipError(f"not a video, or cut off before its index ({_text(error)})") from error


def _metadata_options() -> dict[str, Any]:
    """Titles that are not UTF-8 are no reason to refuse a clip; PyAV 19 agrees, and knows no such option any more."""
    import av

    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def _size(source: Path | bytes) -> int:
    try:
        return len(source) if isinstance(source, bytes) else source.stat().st_size
    except OSError as error:
        raise BrokenClipError(error.strerror or type(error).__name__) from error


def _best_stream(container: InputContainer) -> VideoStream:
    """As ffmpeg chooses: what is marked as default, then the stream with most pixels; no cover pictures."""
    from av.stream import Disposition
    from av.video.stream import VideoStream

    if not container.streams.video:
        raise BrokenClipError("no video stream")
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.codec_context is None:
        raise BrokenClipError("no decoder for its video")
    if stream.disposition & Disposition.attached_pic:
        raise BrokenClipError("no video stream, only a cover picture")
    if not stream.codec_context.width or not stream.codec_context.height:
        raise BrokenClipError("frames of zero size")
    if stream.codec_context.width * stream.codec_context.height > _MAX_PIXELS:
        raise BrokenClipError(f"frames of {stream.codec_context.width} x {stream.codec_context.height} pixels")
    stream.codec_context.thread_count = 1  # loaders have processes, not cores to spare
    return stream


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Video:
    """An open video stream. Its readers start anew each time they are called."""

    def __init__(self, source: Path | bytes) -> None:
        self._source = source
        self._open()
        self._tick = self._stream.time_base or 1 / _DEFAULT_RATE
        self._period = 1 / (self._stream.average_rate or _DEFAULT_RATE)

    def close(self) -> None:
        """Let go of the file."""
        self._container.close()

    def _open(self) -> None:
        self._container = _open_container(self._source)
        self._stream = _best_stream(self._container)
        self._is_fresh = True

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a stored pixel to its height."""
        return self._stream.sample_aspect_ratio or Fraction(1)

    def stated_span(self) -> Span | None:
        """What the header says of this stream, or None where it says nothing."""
        if not self._stream.duration or self._stream.duration < 0:
            return None
        first = (self._stream.start_time or 0) * self._tick
        return Span(first, first + self._stream.duration * self._tick)

    def packet_span(self) -> Span:
        """What the packets say: reads the file once, and decodes nothing."""
        self._rewind()
        return self._span_of(self._packet_times())

    def decoded_span(self) -> Span:
        """What can be decoded: decodes all of it."""
        return self._span_of((frame.time, frame.end) for frame in self.frames())

    def _packet_times(self) -> Iterator[Shown]:
        before = None
        for packet in self._packets():
            if packet.size and not packet.is_discard:
                before = self._when(packet, before)
                yield before

    def _span_of(self, shown: Iterator[Shown]) -> Span:
        times: list[Fraction] = []
        end, damage = Fraction(0), ""
        try:
            for time, until in shown:
                end = max(end, until) if times else until
                times.append(time)
        except EarlyEndError as error:
            damage = str(error)
        first = min(times, default=end)
        stated = self._stated_length()
        if not damage and stated - (end - first) > _SHORTFALL:
            damage = f"cut off from {float(stated):.2f} s"
        return Span(first, end, tuple(sorted(times)), damage)

    def _stated_length(self) -> Fraction:
        """Of this stream or, where only that is said, of the longest one; 0 if unknown."""
        import av

        if self._stream.duration:
            return self._stream.duration * self._tick
        return Fraction(self._container.duration or 0, av.time_base)

    def frames(self, start: Fraction | None = None) -> Iterator[TimedFrame]:
        """Frames in order to the end, from a frame that is shown at ``start`` or before it (None: the first).

        Raises:
            EarlyEndError: where the file is damaged.
        """
        if start is not None and self._seek(start):
            frames = self._decode()
            leading = next(frames, None)
            if leading is not None and leading.time <= start:
                yield leading
                yield from frames
                return
        self._rewind()
        yield from self._decode()

    def _rewind(self) -> None:
        if not self._is_fresh:  # seeking the start misses the first key frame of some containers
            self.close()
            self._open()

    def _seek(self, time: Fraction) -> bool:
        """Go to the last key frame at or before a time; False if the file cannot."""
        import av

        self._is_fresh = False
        try:
            self._container.seek(floor(time / self._tick), stream=self._stream)
        except av.FFmpegError:
            return False
        return True

    def _decode(self) -> Iterator[TimedFrame]:
        before = None
        for packet in self._packets():
            for image in _decode_packet(packet):
                if image.is_corrupt and before:
                    raise EarlyEndError("damaged")
                if not image.is_corrupt:  # else it leads to a key frame that was sought
                    before = self._when(image, before)
                    yield TimedFrame(*before, image)

    def _packets(self) -> Iterator[Packet]:
        import av

        self._is_fresh = False
        packets = self._container.demux(self._stream)
        try:
            if self._container.format.name != "gif" or _has_gif_end(self._source):
                yield from packets
            else:
                yield from _but_last(packets)
                raise EarlyEndError("cut off")
        except (av.FFmpegError, IndexError) as error:  # IndexError: a packet of a stream that is not there
            raise EarlyEndError(f"damaged: {_text(error)}") from error

    def _when(self, item: Packet | VideoFrame, before: Shown | None) -> Shown:
        """From when to when something is shown; where its time is missing, after what came before."""
        ticks = item.dts if item.pts is None else item.pts
        time = ticks * self._tick if ticks is not None else before[1] if before else Fraction(0)
        return time, time + (item.duration * self._tick if item.duration else self._period)


def _decode_packet(packet: Packet) -> list[VideoFrame]:
    import av

    try:
        return packet.decode()
    except av.FFmpegError as error:
        raise EarlyEndError(f"damaged: {_text(error)}") from error


def _has_gif_end(source: Path | bytes) -> bool:
    """Whether a gif is whole: its decoder draws as much of a frame as there is, and does not say so."""
    if isinstance(source, bytes):
        return source[-1:] == b";"
    with source.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b";"


def _but_last(packets: Iterator[Packet]) -> Iterator[Packet]:
    held = None
    for packet in packets:
        if held is not None and packet.size:
            yield held
        held = packet if packet.size else held


def display_matrix(frame: VideoFrame) -> tuple[tuple[int, int], tuple[int, int]]:
    """((a, b), (c, d)): the stored point (x, y) belongs at (ax + cy, bx + dy) of the screen, up to a shift.

    The identity for the frames of most files.
    """
    found = cast("Sequence[SideData]", frame.side_data)
    entries = [found[i] for i in range(len(found))]  # what iterating gives depends on PyAV's version
    data = next((bytes(entry) for entry in entries if entry.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return (1, 0), (0, 1)
    a, b, _, c, d, *_ = struct.unpack("=9i", data)
    return (a, b), (c, d)
