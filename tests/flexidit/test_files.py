from __future__ import annotations

from pathlib import Path

import pytest

from flexidit.files import replacing, write_atomically


def test_a_block_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    write_atomically(path, b"old")

    def fail_half_way() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_nobody_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_names_as_long_as_a_file_system_takes_them(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".mp4")
    write_atomically(path, b"clip")
    assert path.read_bytes() == b"clip" and list(tmp_path.iterdir()) == [path]
