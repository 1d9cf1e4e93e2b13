"""Files that are found in a fixed order, and files that are whole or not there: written beside their place, renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def files_below(root: Path, suffixes: Collection[str]) -> list[str]:
    """Files of these kinds (``.jpg``, in any case) below a folder, relative to it, with forward slashes, sorted."""
    relative = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in suffixes)
    # compare component by component, so that "a/x" < "a-b/x" whatever the separator's code point is
    return [path.as_posix() for path in sorted(relative, key=lambda path: path.parts)]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if the block ends well, and disappears if it does not.

    A reader, or a run that is killed at any moment, sees the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:32]}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp's files are for their owner only
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes as :func:`replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
