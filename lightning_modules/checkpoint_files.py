"""Checkpoints on disk: files or folders that are whole or not there, and which of a run's are there, newest first.

What is being written lies in ``.flexidit-unfinished``, a folder beside the checkpoints and hence on their file system:

- ``writing/NAME`` may be half;
- ``written/NAME`` is whole and on the disk, and about to take its place;
- ``replaced/NAME`` was in that place before, and is about to go.

A file takes its place in one step. A folder cannot replace another, so a job that is killed between two steps leaves
the new one in ``written``, and :func:`recover` ends what it began. No name is derived from a checkpoint's: Lightning
would count ``.hpc_ckpt_3.ckpt.tmp`` as the third of SLURM's checkpoints, and look for it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

UNFINISHED = ".flexidit-unfinished"
SUFFIX = ".ckpt"


def writing(path: Path) -> Path:
    """Where what will be ``path`` is written."""
    return _stage(path, "writing")


def begin(path: Path) -> Path:
    """The same, with nothing there yet."""
    temporary = writing(path)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    delete(temporary)
    return temporary


def place(path: Path) -> None:
    """What was written goes to the disk, and then takes its place: ``path`` is the old one or the new one.

    Raises:
        OSError: it cannot; the old one is as it was.
    """
    temporary = writing(path)
    _flush(temporary)
    if temporary.is_file() and not path.is_dir():
        temporary.replace(path)
    else:
        ready = _stage(path, "written")
        ready.parent.mkdir(exist_ok=True)
        delete(ready)
        temporary.rename(ready)
        _replace(path)
    _flush_folder(path.parent)
    _tidy(path.parent)


def abandon(path: Path) -> None:
    """Remove what was written of ``path``, whether or not it can be."""
    with suppress(OSError):
        delete(writing(path))
        _tidy(path.parent)


def recover(folder: Path) -> list[str]:
    """End what a killed job began in this folder; the names of what it left half and is gone now.

    Only one job may write to a folder: this would take another's file from under it.
    """
    unfinished = folder / UNFINISHED
    for ready in _inside(unfinished / "written"):
        _replace(folder / ready.name)
    for old in _inside(unfinished / "replaced"):
        if not (folder / old.name).exists():
            old.rename(folder / old.name)
    half = [path.name for path in _inside(unfinished / "writing")]
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    return half


def candidates(folders: Iterable[Path]) -> list[Path]:
    """Checkpoints in these folders, newest first; where two are of one moment, the one called last.

    One that is written and has not taken its place counts.
    """
    found: dict[Path, tuple[int, bool]] = {}
    for folder in dict.fromkeys(folders):
        for path in [*_inside(folder), *_inside(folder / UNFINISHED / "written")]:
            if path.suffix == SUFFIX and path.exists():
                key = (path.stat().st_mtime_ns, path.stem == "last")
                found[folder / path.name] = max(key, found.get(folder / path.name, key))
    return sorted(found, key=lambda path: found[path], reverse=True)


def delete(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _stage(path: Path, stage: str) -> Path:
    return path.parent / UNFINISHED / stage / path.name


def _replace(path: Path) -> None:
    """What is written and whole takes the place of what is there; may be called again if it was stopped."""
    old = _stage(path, "replaced")
    if path.exists() or path.is_symlink():
        old.parent.mkdir(exist_ok=True)
        delete(old)
        path.rename(old)
    _stage(path, "written").rename(path)
    delete(old)


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _flush(path: Path) -> None:
    """Have the disk hold it, before its name says that it does."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return
    for inner in _inside(path):
        _flush(inner)
    _flush_folder(path)


def _flush_folder(folder: Path) -> None:
    """Have the disk hold the names in a folder; some file systems do that by themselves and refuse to be asked."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _tidy(folder: Path) -> None:
    """Remove the working folders, unless something is in them."""
    unfinished = folder / UNFINISHED
    with suppress(OSError):
        for stage in _inside(unfinished):
            stage.rmdir()
        unfinished.rmdir()
