"""The benchmark that measures memory trains recipes alone and as one of many, with the recipe's own module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
model:
  class_path: lightning_modules.TextToVideo
  init_args:
    target: {variant: VideoDiT-Tiny, checkpoint: nowhere}
    flex: {patch_sizes: [2x2x2, 1x4x4], recipe: lora, rank: 4}
    compile: true
    vae: nowhere
data: {init_args: {batch_size: 2}}
trainer: {precision: bf16-mixed, gradient_clip_val: 0.5}
"""


@pytest.mark.parametrize("num_gpus", [1, 8])
def test_a_recipe_trains(repository: Path, tmp_path: Path, num_gpus: int) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = [sys.executable, "benchmarks/memory_on_gpu.py", str(recipe), "--gpus", str(num_gpus), "--steps", "2"]
    options = ["--accelerator", "cpu", "--json", str(tmp_path / "found.json")]
    done = subprocess.run([*command, *options], cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = json.loads((tmp_path / "found.json").read_text())["measurements"]
    assert row["computed"] > 0
    assert row["allocated"] == row["reserved"] == 0  # trained to the end, with no GPU to ask
