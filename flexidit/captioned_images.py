"""Finding captioned images and clips: COCO annotations, a ``metadata.jsonl``, or a text file beside each of them.

What cannot be used is named and counted, entry by entry; only a source that as a whole is unusable is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from flexidit.clips import CLIP_SUFFIXES
from flexidit.files import files_below
from flexidit.images import IMAGE_SUFFIXES
from flexidit.skips import SkipReport

METADATA_LINES = "metadata.jsonl"
_FILE_KEYS = ("file_name", "file")
_CAPTION_KEYS = ("captions", "caption", "text")


@dataclass(frozen=True)
class CaptionedFile:
    """An image or a clip, and what is said of it."""

    file: str
    """Path relative to the index's root, with forward slashes."""
    captions: tuple[str, ...]
    """One at least, none empty, without white space at the ends, in the order of the source."""


@dataclass(frozen=True)
class CaptionedIndex:
    """Captioned images or clips in a fixed order: sorted by path."""

    root: Path
    items: list[CaptionedFile]
    skips: SkipReport = field(default_factory=SkipReport)
    """What was left out: files without captions, captions without a file, entries that cannot be read."""
    noun: str = "image"
    """What the files are: "image" or "clip"."""

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def files(self) -> list[str]:
        """Paths relative to ``root``."""
        return [item.file for item in self.items]

    @property
    def num_captions(self) -> int:
        """Captions of all files."""
        return sum(len(item.captions) for item in self.items)

    def path(self, index: int) -> Path:
        """Where one file lies."""
        return self.root / self.items[index].file


def find_captioned_images(root: str | Path, captions: str | Path | None = None) -> CaptionedIndex:
    """List the images under ``root`` with their captions.

    Args:
        root: folder with the images, at any depth.
        captions: where the captions are:

            - a ``.json`` file of COCO annotations (``images`` with ``id`` and ``file_name``, ``annotations`` with
              ``image_id`` and ``caption``);
            - a ``.jsonl`` file with one object a line: ``file_name``, and ``text``, ``caption`` or ``captions`` (a text
              or a list of texts); several lines may speak of one image;
            - a folder with a file for each image, at the same relative path: ``.txt`` (one caption a line) or, where
              there is none, ``.json`` (a text, a list of texts, or an object as in the lines above);
            - None: ``root/metadata.jsonl`` if it is there, else COCO's own place for annotations
              (``annotations/captions_*.json`` in ``root``, or beside it with its name), else files beside the images.

    Returns:
        The index. Listed files are paths under ``root``, or bare names that are unique there. Repeated captions of one
        image are kept once.

    Raises:
        FileNotFoundError: if ``root`` or ``captions`` does not exist, or no image is there.
        ValueError: if the captions as a whole cannot be read, or leave no image.
    """
    return _find_captioned(Path(root), captions, "image", IMAGE_SUFFIXES)


def find_captioned_clips(root: str | Path, captions: str | Path | None = None) -> CaptionedIndex:
    """List the clips (videos) under ``root`` with their captions, found as those of :func:`find_captioned_images`."""
    return _find_captioned(Path(root), captions, "clip", CLIP_SUFFIXES)


def _find_captioned(root: Path, captions: str | Path | None, noun: str, suffixes: frozenset[str]) -> CaptionedIndex:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of {noun}s at {root}")
    gathered = _Gathered(root, files_below(root, suffixes), noun)
    if not gathered.files:
        raise FileNotFoundError(f"no {noun}s in {root}: expected {', '.join(sorted(suffixes))}")
    source = _find_captions(root) if captions is None else Path(captions)
    _reader_of(source)(source, gathered)
    return gathered.index(source)


def _find_captions(root: Path) -> Path:
    """Where captions are if nobody says so: a file, or ``root`` itself."""
    if (root / METADATA_LINES).is_file():
        return root / METADATA_LINES
    beside = root.parent / "annotations" / f"captions_{root.name}.json"
    found = sorted(root.glob("annotations/captions_*.json")) or [path for path in [beside] if path.is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{root} has several annotations ({names}): name the one to use")
    return found[0] if found else root


def _reader_of(source: Path) -> Callable[[Path, _Gathered], None]:
    if source.is_dir():
        return _read_sidecars
    readers = {".json": _read_coco, ".jsonl": _read_lines}
    if not source.is_file():
        raise FileNotFoundError(f"no captions at {source}: give COCO's .json, a .jsonl, or a folder of text files")
    if source.suffix.lower() not in readers:
        raise ValueError(f"{source} is no source of captions: give COCO's .json, a .jsonl, or a folder of text files")
    return readers[source.suffix.lower()]


class _Gathered:
    """Images or clips, and the captions found for them so far."""

    def __init__(self, root: Path, files: list[str], noun: str) -> None:
        self.root, self.files, self.noun, self.skips = root, files, noun, SkipReport()
        self.captions: dict[str, list[str]] = {}
        self._known = set(files)
        self._by_name: dict[str, list[str]] = {}
        for file in files:
            self._by_name.setdefault(file.rsplit("/", 1)[-1], []).append(file)

    def find(self, name: str) -> str | None:
        """The file of that path or name; None, and counted, if there is none or not one."""
        path = PurePosixPath(name).as_posix()
        for file in (path, path.removeprefix(f"{self.root.name}/")):
            if file in self._known:
                return file
        same = self._by_name.get(path, [])
        if len(same) != 1:
            self.skips.add(name, f"{len(same)} {self.noun}s have this name" if same else f"{self.noun} not found")
        return same[0] if len(same) == 1 else None

    def add(self, file: str, captions: Any, where: str) -> None:
        """Count in what is said of a file: a text or a list of texts; ``where`` names the entry."""
        kept = self.captions.setdefault(file, [])
        for caption in captions if isinstance(captions, list) else [captions]:
            reason = caption_fault(caption) or ("duplicate caption" if caption.strip() in kept else None)
            if reason:
                self.skips.add(where, reason)
            else:
                kept.append(caption.strip())

    def index(self, source: Path) -> CaptionedIndex:
        """The files that have a caption; the others are counted.

        Where captions are listed in a file, only the files of folders that it speaks of are expected to have one.
        """
        folders = {_folder(file) for file in self.captions}
        expected = [file for file in self.files if source.is_dir() or _folder(file) in folders]
        named = {skip.name for skip in self.skips}
        items = []
        for file in expected:
            if self.captions.get(file):
                items.append(CaptionedFile(file, tuple(self.captions[file])))
            elif file not in named:  # the reason is known where it is
                self.skips.add(file, "no caption")
        if not items:
            raise ValueError(f"no {self.noun} in {self.root} has a caption in {source} ({self.skips.summary('item')})")
        return CaptionedIndex(self.root, items, self.skips, self.noun)


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def caption_fault(caption: Any) -> str | None:
    """Why something is no caption, or None."""
    if not isinstance(caption, str):
        return f"caption is {type(caption).__name__}, not text"
    try:
        caption.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return "caption is not valid text"
    return None if caption.strip() else "empty caption"


def _parse(data: bytes) -> Any:
    """JSON of bytes.

    Raises:
        ValueError: with the reason in a few words.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error


def _first(entry: dict[str, Any], keys: Iterable[str]) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _read_coco(path: Path, gathered: _Gathered) -> None:
    file_of = dict(_coco_images(path, gathered))
    for number, entry in enumerate(_coco_entries(path, "annotations")):
        where = f"{path.name} annotation {entry.get('id', number) if isinstance(entry, dict) else number}"
        image = entry.get("image_id") if isinstance(entry, dict) else None
        if not _is_id(image) or image not in file_of:
            gathered.skips.add(where, f"its image {image!r} is not listed")
        elif file_of[image] is not None:
            gathered.add(file_of[image], entry.get("caption"), where)


def _coco_images(path: Path, gathered: _Gathered) -> Iterator[tuple[Any, str | None]]:
    """``(id, file)`` of each image; None where the file cannot be used."""
    seen = set()
    for number, entry in enumerate(_coco_entries(path, "images")):
        key, name = (entry.get("id"), entry.get("file_name")) if isinstance(entry, dict) else (None, None)
        if not _is_id(key) or not isinstance(name, str):
            gathered.skips.add(f"{path.name} image {number}", "no id or file_name")
        elif key in seen:
            gathered.skips.add(name, f"id {key} is listed twice")
        else:
            seen.add(key)
            file = gathered.find(name)
            if file is not None:
                gathered.captions.setdefault(file, [])
            yield key, file


def _coco_entries(path: Path, name: str) -> list[Any]:
    try:
        content = _parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"the annotations {path} cannot be read: {error}") from error
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not COCO's annotation of captions: it needs lists named images and annotations")
    return entries


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _read_lines(path: Path, gathered: _Gathered) -> None:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path.name} line {number}"
        try:
            entry = _parse(line) if line.strip() else None
        except ValueError as error:
            gathered.skips.add(where, str(error))
            continue
        if line.strip():
            _read_line(entry, where, gathered)


def _read_line(entry: Any, where: str, gathered: _Gathered) -> None:
    name = _first(entry, _FILE_KEYS) if isinstance(entry, dict) else None
    if not isinstance(name, str):
        gathered.skips.add(where, "no file_name")
        return
    file = gathered.find(name)
    if file is None:
        return
    captions = _first(entry, _CAPTION_KEYS)
    if captions is None:
        gathered.skips.add(where, "no text")
    else:
        gathered.add(file, captions, f"{where} ({file})")


def _read_sidecars(folder: Path, gathered: _Gathered) -> None:
    used: set[Path] = set()
    kinds: set[str] = set()
    for file in gathered.files:
        texts = [(folder / file).with_suffix(suffix) for suffix in (".txt", ".json")]
        path = next((path for path in texts if path.is_file()), None)
        used.update(texts)
        if path is not None:
            kinds.add(path.suffix)
            _read_sidecar(path, file, gathered)
    for path in sorted(folder.rglob("*")):
        if path.suffix in kinds and path not in used:
            gathered.skips.add(path.relative_to(folder).as_posix(), f"no {gathered.noun} of this name")


def _read_sidecar(path: Path, file: str, gathered: _Gathered) -> None:
    try:
        captions = parse_captions(path.read_bytes(), path.suffix)
    except (ValueError, OSError) as error:
        gathered.skips.add(file, f"{path.name} {error}")
        return
    if captions:
        gathered.add(file, captions, file)
    else:
        gathered.skips.add(file, "empty caption")


def parse_captions(data: bytes, suffix: str) -> Any:
    """What a file beside an image or a clip says: a list of texts of a ``.txt``, whatever the JSON has of another.

    Each of it is still to be checked by :func:`caption_fault`. Nothing (None or an empty list) is an empty file.

    Raises:
        ValueError: with the reason in a few words, if the file cannot be read.
    """
    if suffix == ".json":
        content = _parse(data) if data.strip() else None
        return _first(content, _CAPTION_KEYS) if isinstance(content, dict) else content
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    return [line for line in lines if line.strip()]
