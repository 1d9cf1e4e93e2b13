"""The benchmark of saves measures what it says, at toy size."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexidit import create_model

TOY = ["--model", "DiT-Tiny/2", "--repetitions", "1", "--steps", "1"]


def check(record: dict[str, Any], ways: list[str]) -> None:
    parameters = sum(p.numel() for p in create_model("DiT-Tiny/2").parameters())
    assert record["parameters"] == parameters
    assert record["bytes"] == pytest.approx(4 * 4 * parameters, rel=0.4)  # a shard has a header of its own
    assert [m["way"] for m in record["measurements"]] == ways
    for m in record["measurements"]:
        assert m["stall"] > 0
        assert m["written"] > 0


def test_each_way_is_measured_and_a_checkpoint_holds_four_copies(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("stall", repository / "benchmarks" / "checkpoint_stall.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["stall"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, ways = tmp_path / "stall.json", ["lightning", "streaming", "background"]
    assert module.main([*TOY, "--folder", str(tmp_path), "--json", str(out), "--ways", *ways]) == 0
    check(json.loads(out.read_text())["files"], ways)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stall.json"]
    assert "background" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        module.main(["--ways", "streaming", "--processes", "2"])


def test_shards_are_measured_in_processes_of_their_own(repository: Path, tmp_path: Path) -> None:
    out, ways = tmp_path / "stall.json", ["sharded", "sharded background"]
    command = [sys.executable, str(repository / "benchmarks" / "checkpoint_stall.py"), *TOY, "--threads", "1"]
    command += ["--folder", str(tmp_path), "--json", str(out), "--ways", *ways]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    check(json.loads(out.read_text())["shards"], ways)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stall.json"]
    assert "sharded background" in done.stdout
