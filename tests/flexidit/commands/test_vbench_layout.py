"""Names that VBench finds again, and a script that asks it for each dimension."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexidit.commands.vbench_layout import DIMENSIONS, file_names, script

LONG = "a very long prompt about everything that happens " * 8


def prompt_of(name: str) -> str:
    """As VBench reads it off a file name: without the suffix and the number."""
    return re.sub(r"-\d+$", "", Path(name).stem)


def test_vbench_reads_the_prompt_off_the_name() -> None:
    prompts = ["a red fox in snow", "the 1800s, a house.", "number-1", "caf\u00e9 'noir' (film)"]
    for prompt, name in zip(prompts, file_names(prompts), strict=True):
        assert prompt_of(f"{name}-3.mp4") == prompt


def test_the_suite_s_own_prompts_stay_as_they_are(test_data: Path) -> None:
    prompts = (test_data / "prompts" / "VBench_all_dimension.txt").read_text().splitlines()
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    assert len(prompts) > 900 and file_names(prompts) == prompts


def test_what_is_no_file_name_becomes_one(tmp_path: Path) -> None:
    prompts = [LONG, LONG + "twice", "black/white", "black_white", "two\nlines", "\u96ea" * 200]
    names = [f"{name}-0.mp4" for name in file_names(prompts)]
    assert len(set(names)) == len(prompts)
    for name in names:
        (tmp_path / name).write_bytes(b"clip")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert names[3] == "black_white-0.mp4" and names[2].startswith("black_white (2)")


@pytest.fixture
def vbench(tmp_path: Path) -> dict[str, str]:
    """An environment with a VBench that writes down what it is asked for, and knows one prompt."""
    package, binaries = tmp_path / "site" / "vbench", tmp_path / "bin"
    package.mkdir(parents=True)
    binaries.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is slow to import, and only looked at')")
    (package / "VBench_full_info.json").write_text(json.dumps([{"prompt_en": "a known prompt", "dimension": []}]))
    (binaries / "vbench").write_text('#!/bin/sh\nprintf "%s|" "$@" >> "$ASKED"\necho >> "$ASKED"\n')
    (binaries / "vbench").chmod(0o755)
    (binaries / "python").symlink_to(sys.executable)
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path / "site"), "ASKED": str(tmp_path / "asked")}


def ask(vbench: dict[str, str], folder: Path, prompt: str, *arguments: str) -> list[list[str]]:
    folder.mkdir()
    (folder / "prompts.json").write_text(json.dumps({f"{prompt}-0.mp4": prompt}))
    (folder / "vbench.sh").write_text(script(["clips", "budget-0.6_clips"]))
    subprocess.run(["bash", str(folder / "vbench.sh"), *arguments], check=True, env=vbench, cwd="/")
    return [line.rstrip("|").split("|") for line in Path(vbench["ASKED"]).read_text().splitlines()]


def options(call: list[str]) -> dict[str, str]:
    return dict(zip(call[1::2], call[2::2], strict=True))


def test_own_prompts_are_scored_in_every_dimension(vbench: dict[str, str], tmp_path: Path) -> None:
    calls = ask(vbench, tmp_path / "my clips", "a prompt of mine")
    assert [call[0] for call in calls] == ["evaluate"] * 2 * len(DIMENSIONS)
    assert [options(call)["--dimension"] for call in calls] == [*DIMENSIONS, *DIMENSIONS]
    assert options(calls[0])["--videos_path"] == "clips" and options(calls[-1])["--videos_path"] == "budget-0.6_clips"
    assert {options(call)["--mode"] for call in calls} == {"custom_input"}
    assert {options(call)["--prompt_file"] for call in calls} == {"prompts.json"}


def test_its_own_prompts_are_scored_by_its_protocol(vbench: dict[str, str], tmp_path: Path) -> None:
    calls = ask(vbench, tmp_path / "clips of mine", "a known prompt")
    scored = [options(call) for call in calls if call[0] == "evaluate"]
    assert {entry["--mode"] for entry in scored} == {"vbench_standard"} and "--prompt_file" not in scored[0]
    flicker = next(entry for entry in scored if entry["--dimension"] == "temporal_flickering")
    (filtered, _) = [options(call) for call in calls if call[0] == "static_filter"]
    assert filtered["--videos_path"] == "clips"
    assert flicker["--videos_path"] == f"{filtered['--result_path']}/filtered_videos"


def test_the_mode_can_be_chosen(vbench: dict[str, str], tmp_path: Path) -> None:
    calls = ask(vbench, tmp_path / "clips", "a known prompt", "custom_input")
    assert {options(call)["--mode"] for call in calls} == {"custom_input"}
