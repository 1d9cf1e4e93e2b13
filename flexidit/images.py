"""Image files into model pixels: finding, labelling, tolerant reading, DiT's centre crop.

Shape legend: C channels (3), S side of the square crop. Pixels are float32 in [-1, 1].
"""

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor

from flexidit.files import files_below
from flexidit.skips import BrokenFileError, SkipReport

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
LABELS_FILE = "labels.csv"
CROP = "adm_center"  # name of `center_crop` in fingerprints
_WNID = re.compile(r"n\d{8}")


class BrokenImageError(BrokenFileError):
    """An image that cannot be decoded; the message is the reason, without the file's name."""


def read_image(source: Path | bytes) -> "Image":
    """Decode an image to RGB, upright.

    Grey, palette, CMYK, 16-bit and transparent images become RGB (alpha is dropped, as in DiT's reader); the EXIF
    orientation is applied.

    Raises:
        BrokenImageError: if the file is empty, truncated, not an image, or has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, of which PIL itself only warns: some kilobytes can stand for gigabytes.
    """
    from PIL import Image, ImageOps

    data = source if isinstance(source, bytes) else _read_bytes(source)
    if not data:
        raise BrokenImageError("zero bytes")
    try:
        with catch_warnings():
            simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data)) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    # PIL reports broken files through many unrelated classes: EOFError, SyntaxError, struct.error, ...
    except Exception as error:
        raise BrokenImageError(_reason(error)) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BrokenImageError(error.strerror or type(error).__name__) from error


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _to_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I;16"):  # convert("RGB") would clip everything above 255 to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def center_crop(image: "Image", size: int) -> "Image":
    """The square ``size`` x ``size`` centre that ADM and DiT train on.

    Halve with a box filter while the short side is at least twice the target, go to the target with a bicubic
    filter, cut out the centre (Dhariwal and Nichol 2021; DiT ``train.py``). The two filters matter: one bicubic
    step from a large image aliases, and latents made with another crop are other data.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixels(image: "Image") -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    array = torch.from_numpy(np.array(image))  # (H, W, 3) uint8
    return array.permute(2, 0, 1).float().div_(127.5).sub_(1)


def read_pixels(source: Path | bytes, size: int) -> Tensor:
    """Read, crop and scale one image: (3, S, S) in [-1, 1].

    Raises:
        BrokenImageError: if the file cannot be decoded, or is so narrow that its other side would become absurdly long.
    """
    image = read_image(source)
    _check_shape(image.size, size)
    return to_pixels(center_crop(image, size)).contiguous()


def _check_shape(sides: tuple[int, int], size: int) -> None:
    """Refuse what the crop would first enlarge beyond what is read at all."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size * size * max(sides) > limit * min(sides):
        raise BrokenImageError(f"{sides[0]} x {sides[1]} pixels, too narrow for a crop of {size}")


@dataclass(frozen=True)
class ImageIndex:
    """Labelled images of a folder, in a fixed order: sorted by path, as torchvision's ``ImageFolder`` orders them."""

    root: Path
    files: list[str]
    """Paths relative to ``root``, with forward slashes."""
    labels: list[int]
    skips: SkipReport = field(default_factory=SkipReport)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Where one image lies."""
        return self.root / self.files[index]


def find_images(root: str | Path, labels: str | Path | None = None, num_classes: int | None = None) -> ImageIndex:
    """List the images under ``root`` with their class indices.

    Labels come from a CSV (columns ``class_index`` and ``file`` or ``wnid``; ``root/labels.csv`` is found by itself)
    or from one folder a class. Folder names that are numbers are the class index; otherwise the sorted order of the
    folders is, and that order equals ImageNet's only if all classes are there, which is checked for WordNet ids.

    Args:
        root: folder with images, flat or one folder a class.
        labels: CSV file; None looks for ``root/labels.csv``, then falls back to folders.
        num_classes: classes of the model; None accepts any number.

    Returns:
        The index; images without a label, and CSV rows without an image, are counted in its ``skips``.

    Raises:
        FileNotFoundError: if ``root`` or ``labels`` does not exist, or no image is there.
        ValueError: if no image has a label, a label is out of range, or the order of the classes cannot be right.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of images at {root}")
    files = image_files(root)
    if not files:
        raise FileNotFoundError(f"no images under {root}: looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    table = Path(labels) if labels is not None else root / LABELS_FILE
    if labels is not None and not table.is_file():
        raise FileNotFoundError(f"no label file at {table}")
    index = _label_from_csv(root, files, table) if table.is_file() else _label_from_folders(root, files, num_classes)
    _check_labels(index, num_classes)
    return index


def image_files(root: Path) -> list[str]:
    """Images below a folder, relative to it, with forward slashes, sorted by path."""
    return files_below(root, IMAGE_SUFFIXES)


def _label_from_folders(root: Path, files: Sequence[str], num_classes: int | None) -> ImageIndex:
    folders = sorted({file.split("/")[0] for file in files if "/" in file})
    if not folders:
        raise ValueError(f"the images in {root} have no labels: put them in one folder a class, or add {LABELS_FILE}")
    class_of = _classes_of_folders(root, folders, num_classes)
    return _label(root, files, lambda file: class_of.get(file.split("/")[0]) if "/" in file else None)


def _classes_of_folders(root: Path, folders: Sequence[str], num_classes: int | None) -> dict[str, int]:
    if all(folder.isdecimal() for folder in folders):  # sorted as text, "10" would come before "2"
        return {folder: int(folder) for folder in folders}
    are_wnids = all(_WNID.fullmatch(folder) for folder in folders)
    if are_wnids and num_classes is not None and len(folders) != num_classes:
        raise ValueError(
            f"{root} has {len(folders)} WordNet folders but the model has {num_classes} classes, so their sorted "
            f"order is not the class index: add {LABELS_FILE} with the columns wnid,class_index"
        )
    return {folder: position for position, folder in enumerate(folders)}


def _label_from_csv(root: Path, files: Sequence[str], table: Path) -> ImageIndex:
    by_file, by_wnid = _read_labels(table)

    def find(file: str) -> int | None:
        name = file.rsplit("/", 1)[-1]
        return by_file.get(file, by_file.get(name, by_wnid.get(file.split("/")[0])))

    index = _label(root, files, find)
    known = {*files, *(file.rsplit("/", 1)[-1] for file in files)}
    for file in by_file:
        if file not in known:
            index.skips.add(file, f"listed in {table.name}, not found")
    return index


def _read_labels(table: Path) -> tuple[dict[str, int], dict[str, int]]:
    """``(by file, by wnid)``: rows with a file name label that file, rows without one label the wnid's folder."""
    by_file: dict[str, int] = {}
    by_wnid: dict[str, int] = {}
    with table.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        columns = set(reader.fieldnames or ())
        if "class_index" not in columns or not columns & {"file", "wnid"}:
            raise ValueError(f"{table} needs the columns class_index and file (or wnid), got {sorted(columns)}")
        for row in reader:
            label = _parse_label(row["class_index"], table, reader.line_num)
            names, name = (by_file, row["file"]) if row.get("file") else (by_wnid, row.get("wnid") or "")
            if names.setdefault(name, label) != label:
                raise ValueError(f"{table} line {reader.line_num}: {name!r} already has class {names[name]}")
    return by_file, by_wnid


def _parse_label(text: str | None, table: Path, line: int) -> int:
    if text is None or not text.strip().isdecimal():
        raise ValueError(f"{table} line {line}: class_index must be a whole number from 0, got {text!r}")
    return int(text)


def _label(root: Path, files: Iterable[str], find: Callable[[str], int | None]) -> ImageIndex:
    index = ImageIndex(root, [], [])
    for file in files:
        label = find(file)
        if label is None:
            index.skips.add(file, "no label")
        else:
            index.files.append(file)
            index.labels.append(label)
    return index


def _check_labels(index: ImageIndex, num_classes: int | None) -> None:
    if not index.files:
        raise ValueError(f"none of the {len(index.skips)} images in {index.root} has a label")
    if num_classes is not None and max(index.labels) >= num_classes:
        raise ValueError(
            f"{index.root} has class {max(index.labels)}, but the model has {num_classes} classes (0 to "
            f"{num_classes - 1}): set num_classes, or correct the labels"
        )
