"""The benchmark of the guard runs, and by turns it guards."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def test_both_kinds_of_turns_are_timed(repository: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("step_guard", repository / "benchmarks" / "step_guard.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_guard"] = module
    spec.loader.exec_module(module)
    out = tmp_path / "guard.json"
    options = ["--model", "DiT-Tiny/2", "--input-size", "8", "--batch-size", "2", "--steps", "2", "--turns", "2"]
    assert module.main([*options, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["guarded_ms"] > 0
    assert found["overhead"] == found["guarded_ms"] / found["alone_ms"] - 1
