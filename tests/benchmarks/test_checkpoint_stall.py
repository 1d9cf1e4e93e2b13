"""The benchmark of saves measures what it says, at toy size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from flexidit import create_model


def test_each_way_is_measured_and_a_checkpoint_holds_four_copies(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("stall", repository / "benchmarks" / "checkpoint_stall.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["stall"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "stall.json"
    options = ["--model", "DiT-Tiny/2", "--repetitions", "1", "--steps", "1", "--folder", str(tmp_path)]
    assert module.main([*options, "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    parameters = sum(p.numel() for p in create_model("DiT-Tiny/2").parameters())
    assert record["parameters"] == parameters
    assert record["bytes"] == pytest.approx(4 * 4 * parameters, rel=0.2)
    assert [m["way"] for m in record["measurements"]] == ["lightning", "streaming", "background"]
    for m in record["measurements"]:
        assert m["stall"] > 0
        assert m["written"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stall.json"]
    assert "background" in capsys.readouterr().out
