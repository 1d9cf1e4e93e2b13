"""What is read of tars of unknown origin: regular files of a bounded size, by name, and nothing else.

Nothing is ever written to disk under a member's name, and no member is unpickled. Even so a name that leads out of the
archive, a link or a device has no business in training data: it is named and left out, since who wrote the tar did not
know what they did, or did.
"""

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from flexidit.skips import printable

MAX_FILE_BYTES = 1 << 30
"""Of an image or a clip, and of any member that is only passed over; ``shuffle_buffer`` of them are held in memory."""
MAX_TEXT_BYTES = 1 << 20
"""Of a label or of captions."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members

Limit = Callable[[str], int | None]
"""How many bytes a member with these suffixes ("jpg", "seg.png", in lower case) may have; None: it is not read."""


class BrokenSampleError(ValueError):
    """A tar, or a sample of it, that cannot be used."""

    def __init__(self, name: str, reason: str) -> None:
        name, reason = printable(name), printable(reason)
        super().__init__(f"{name} {reason}" if reason.startswith(("has ", "is ")) else f"{name}: {reason}")
        self.name, self.reason = name, reason


def read_members(
    tars: Iterable[str], limit: Limit, handle: Callable[[BrokenSampleError], bool]
) -> Iterator[dict[str, Any]]:
    """Files of tars as webdataset groups them: ``{"fname", "data", "__url__"}``, and ``{}`` after each tar.

    Files that are not to be read are there without content. A tar that cannot be opened, or not be read to its end, is
    handled, and the next one follows.

    Args:
        tars: files or URLs.
        limit: of a member's size.
        handle: told of what is left out.
    """
    for tar in tars:
        try:
            for name, data in _files(tar, limit, handle):
                yield {"fname": name, "data": data, "__url__": tar}
        except (OSError, tarfile.TarError, EOFError) as error:
            handle(BrokenSampleError(tar, _reason(error)))
        yield {}


def member_fault(member: tarfile.TarInfo, limit: int | None = None) -> str | None:
    """Why a member is left out, or None."""
    if member.issym() or member.islnk():
        return "is a link"
    if member.isdev():
        return "is a device"
    if not member.isreg():
        return "is of an unknown kind"
    if member.issparse():  # some bytes of a tar can stand for terabytes of zeros
        return "is a sparse file"
    path = member.name.replace("\\", "/")
    if path.startswith("/") or path[1:3] == ":/" or ".." in path.split("/"):
        return "has a name that leads out of the archive"
    if limit is not None and member.size > limit:
        return f"has {member.size} bytes, {limit} are allowed"
    return None


def _is_absurd(member: tarfile.TarInfo) -> bool:
    """Whether it says to be so large that passing over it could take for ever, whatever is really there."""
    return member.size > MAX_FILE_BYTES


def suffixes_of(name: str) -> str:
    """What is after the first point of a member's last part, in lower case, as webdataset splits names."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _files(tar: str, limit: Limit, handle: Callable[[BrokenSampleError], bool]) -> Iterator[tuple[str, bytes]]:
    from webdataset.gopen import gopen

    stream = gopen(tar)
    try:
        _refuse_compressed(tar, stream)
        # "r|" and not "r|*": a compressed tar of some megabytes can stand for terabytes.
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                if _is_absurd(member):
                    reason = f"has {member.size} bytes, {MAX_FILE_BYTES} are allowed: the rest of the tar is left out"
                    handle(BrokenSampleError(f"{tar}: {member.name}", reason))
                    return
                if member.isdir() or _META.match(member.name):
                    continue
                allowed = limit(suffixes_of(member.name))
                fault = member_fault(member, allowed)
                if fault is not None:
                    handle(BrokenSampleError(f"{tar}: {member.name}", fault))
                    continue
                file = archive.extractfile(member) if allowed is not None else None
                yield member.name, b"" if file is None else file.read()
    finally:
        with suppress(Exception):  # a command whose output was not read to its end complains
            stream.close()


def _refuse_compressed(tar: str, stream: Any) -> None:
    head = stream.peek(6) if hasattr(stream, "peek") else b""
    kind = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)
    if kind is not None:
        raise tarfile.ReadError(f"is compressed with {kind}: unpack it, images and clips do not get smaller")


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return (strerror or str(error) or type(error).__name__).splitlines()[0]
