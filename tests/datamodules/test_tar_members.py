"""Tars that somebody made on purpose: what is dangerous in them is named and left out, and the rest is read."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.loading import stream_loader
from datamodules.tar_members import MAX_TEXT_BYTES, suffixes_of
from datamodules.tar_samples import TarSamples, TarTarget, count_samples, expand_tars
from flexidit.sample_readers import ImageReader
from flexidit.skips import printable


def jpeg(size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (70, 70, 70)).save(buffer, "jpeg")
    return buffer.getvalue()


class Payload:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[Any, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def sample(key: str, image: bytes | None = None, label: bytes = b"7") -> list[tuple[Any, bytes]]:
    return [member(f"{key}.jpg", jpeg() if image is None else image), member(f"{key}.cls", label)]


def write(path: Path, members: list[tuple[Any, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def read(tar: str, target: TarTarget = "label", **options: Any) -> tuple[list[str], dict[str, str]]:
    """(names of the samples that were read, reasons by the name of what was left out)."""
    dataset = TarSamples(
        [tar], ImageReader(256), target=target, num_samples=9, batch_size=1, training=False, **options
    )  # fmt: skip
    names = [name for batch in stream_loader(dataset, 1) for name in batch["names"]]
    return names, {skip.name: skip.reason for skip in dataset.report()}


HOSTILE: dict[str, tuple[list[tuple[Any, bytes]], str, str]] = {  # members, name of what is left out, reason
    "absolute": (sample("/etc/a"), "/etc/a.jpg", "leads out of the archive"),
    "parent": (sample("../../a"), "../../a.jpg", "leads out of the archive"),
    "parent within": (sample("x/../../a"), "x/../../a.jpg", "leads out of the archive"),
    "backslashes": (sample("x\\..\\..\\a"), "x\\..\\..\\a.jpg", "leads out of the archive"),
    "drive": (sample("C:\\a"), "C:\\a.jpg", "leads out of the archive"),
    "link": ([member("a.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd")], "a.jpg", "is a link"),
    "hard link": ([member("a.jpg", kind=tarfile.LNKTYPE, linkname="../secret")], "a.jpg", "is a link"),
    "character device": ([member("a.jpg", kind=tarfile.CHRTYPE, devmajor=1, devminor=5)], "a.jpg", "is a device"),
    "block device": ([member("a.jpg", kind=tarfile.BLKTYPE)], "a.jpg", "is a device"),
    "pipe": ([member("a.jpg", kind=tarfile.FIFOTYPE)], "a.jpg", "is a device"),
    "sparse": ([member("a.jpg", kind=tarfile.GNUTYPE_SPARSE)], "a.jpg", "is a sparse file"),
    "unknown kind": ([member("a.jpg", kind=b"Z")], "a.jpg", "is of an unknown kind"),
    "long label": (sample("a", label=b"9" * (MAX_TEXT_BYTES + 1)), "a.cls", f"{MAX_TEXT_BYTES} are allowed"),
    "many digits": (sample("a", label=b"9" * 5000), "a", "has the label"),
    "negative": (sample("a", label=b"-1"), "a", "has the label '-1'"),
    "pixel bomb": (sample("a", bomb(60000, 60000)), "a", "decompression bomb"),
    "half a bomb": (sample("a", bomb(12000, 12000)), "a", "decompression bomb"),
    "narrow": (sample("a", jpeg((1, 60000))), "a", "1 x 60000 pixels, too narrow for a crop of 256"),
    "terminal": ([member("\x1b[2Ja.jpg", kind=tarfile.SYMTYPE)], "\\x1b[2Ja.jpg", "is a link"),
}


@pytest.mark.parametrize(("members", "name", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_dangerous_is_named_and_left_out_and_the_rest_is_read(
    members: list[tuple[Any, bytes]], name: str, reason: str, tmp_path: Path
) -> None:
    tar = write(tmp_path / "a.tar", [*sample("first"), *members, *sample("last")])
    names, left_out = read(tar)
    assert names == [f"{tar}: first", f"{tar}: last"]
    assert reason in left_out[f"{tar}: {name}"]
    with pytest.raises(ValueError, match="a.tar: "):
        read(tar, on_error="raise")


@pytest.mark.parametrize("suffix", ["jpg", "other"])
def test_a_size_that_nobody_has_is_named_and_not_waited_for(suffix: str, tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar", sample("first"))
    info = tarfile.TarInfo(f"huge.{suffix}")
    info.size = 1 << 45
    content = Path(tar).read_bytes().rstrip(b"\0")
    content += b"\0" * (-len(content) % 512) + info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 2048
    Path(tar).write_bytes(content)
    names, left_out = read(tar)
    assert names == [f"{tar}: first"]
    assert f"has {1 << 45} bytes" in left_out[f"{tar}: huge.{suffix}"]
    assert count_samples([tar]) == 1


@pytest.mark.parametrize("target", ["label", "caption"])
def test_a_pickle_is_never_unpickled(target: TarTarget, tmp_path: Path) -> None:
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    suffixes = ("pkl", "pickle", "pyd", "pth", "npy", "cls", "txt", "json", "jpg", "jpg.pkl")
    members = [member(f"a{suffix}.{suffix}", payload) for suffix in suffixes]
    good = [
        member("good.jpg", jpeg()),
        member("good.cls", b"7"),
        member("good.txt", b"grey"),
        member("good.pkl", payload),
    ]
    tar = write(tmp_path / "a.tar", [*members, *good])
    names, _ = read(tar, target)
    assert names == [f"{tar}: good"]
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload)  # it would have
    assert (tmp_path / "ran").exists()


def test_a_compressed_tar_is_refused_by_name(tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar", sample("first"))
    Path(tar).write_bytes(gzip.compress(Path(tar).read_bytes()))
    with pytest.raises(ValueError, match=r"none of the samples .* \(is compressed with gzip: unpack it"):
        read(tar)
    assert count_samples([tar]) == 0


def test_a_file_whose_name_is_a_command_is_only_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pipe:mkdir ran; cat x.tar", sample("first"))
    [tar] = expand_tars(".")
    names, _ = read(tar)
    assert names == ["./pipe:mkdir ran; cat x.tar: first"]
    assert not (tmp_path / "ran").exists()


def test_deep_json_is_named(tmp_path: Path) -> None:
    good = [member("good.jpg", jpeg()), member("good.txt", b"grey")]
    tar = write(tmp_path / "a.tar", [member("a.jpg", jpeg()), member("a.json", b"[" * 100_000), *good])
    names, left_out = read(tar, "caption")
    assert names == [f"{tar}: good"]
    assert "broken JSON" in left_out[f"{tar}: a"]


def test_names_and_suffixes() -> None:
    assert [suffixes_of(name) for name in ("a/b.c/d.JPG", "d.seg.png", "a.b/c")] == ["jpg", "seg.png", ""]
    assert printable("caf\u00e9 \u4f60\t\udce9") == "caf\u00e9 \u4f60\\t\\udce9"
