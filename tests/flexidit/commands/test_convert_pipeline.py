from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from flexidit import create_model, flexify, save_checkpoint
from flexidit.cli import main

SHAPE: dict[str, Any] = {"input_size": (5, 8, 8), "in_channels": 16, "caption_channels": 32}


@pytest.fixture
def adapters(tmp_path: Path, randomised: Callable[..., nn.Module]) -> str:
    """Of a student, beside their base."""
    target = create_model("Wan-Tiny", **SHAPE)
    randomised(target)
    base = save_checkpoint(target, tmp_path / "base.safetensors")
    student = flexify(target, ["2x2x2", "1x4x4"], recipe="lora", rank=2, positions="grid")
    randomised(student, seed=1)
    path = tmp_path / "adapters.safetensors"
    return str(save_checkpoint(student, path, adapters_only=True, base_source=str(base)))


def run(adapters: str, output: Path, pipeline: Path, *line: str) -> int:
    return main(["convert", adapters, str(output), "--to", "wan-pipeline", "--pipeline", str(pipeline), *line])


def test_adapters_become_a_pipeline(adapters: str, wan_pipeline: Path, tmp_path: Path, capsys: Any) -> None:
    from diffusers import WanPipeline

    out, line = tmp_path / "out", ["--schedule", "1x4x4:3,1x2x2:2", "--time-shift", "5", "--dtype", "bfloat16"]
    assert run(adapters, out, wan_pipeline, *line) == 0
    captured = capsys.readouterr()
    assert "switch  from 1x4x4 to 1x2x2 at boundary_ratio 0." in captured.out and captured.err == ""
    assert "call it with num_inference_steps=5" in captured.out
    pipeline = WanPipeline.from_pretrained(out)
    assert pipeline.transformer.config.patch_size == [1, 4, 4]
    assert pipeline.transformer_2.config.patch_size == [1, 2, 2]
    assert pipeline.scheduler.config["flow_shift"] == 5


def test_a_size_of_clips_may_be_said(adapters: str, wan_pipeline: Path, tmp_path: Path, capsys: Any) -> None:
    line = ["--schedule", "2x2x2:3,1x2x2:2", "--json", "--link"]
    assert run(adapters, tmp_path / "out", wan_pipeline, *line) == 2
    assert "2x2x2 does not divide latent clips of 5x8x8" in capsys.readouterr().err
    assert run(adapters, tmp_path / "out", wan_pipeline, *line, "--input-size", "6x8x8") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["call"]["transformer"] == "2x2x2" and 0 < report["call"]["boundary_ratio"] < 1
    assert report["written"]["input_size"] == [6, 8, 8]
    assert report["tensors_compared"] == 2 * len(create_model("Wan-Tiny", **SHAPE).state_dict())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--to wan-pipeline", "needs --pipeline, the stock one, and --schedule"),
        ("--to wan-pipeline --pipeline {stock}", "needs --pipeline, the stock one, and --schedule"),
        ("--to merged --schedule 1x4x4:3,1x2x2:2", "--schedule is for --to wan-pipeline, not merged"),
        ("--to wan-pipeline --pipeline {stock} --schedule 1x4x4:3,1x2x2:2 --patch-size 4", "leave --patch-size out"),
        ("--to wan-pipeline --pipeline {stock} --schedule 1x2x2:5", "switches once"),
        ("--to wan-pipeline --pipeline {stock} --schedule 1x4x4:3,1x2x2:2 --solver ddpm", "solver 'ddpm' does not fit"),
        ("--to wan-pipeline --pipeline gone --schedule 1x4x4:3,1x2x2:2", "gone has no model_index.json"),
    ],
)
def test_refusals(
    line: str, sentence: str, adapters: str, wan_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", adapters, str(tmp_path / "out"), *line.format(stock=wan_pipeline).split()]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_stock_pipeline_is_not_written_into(adapters: str, wan_pipeline: Path, capsys: Any) -> None:
    assert run(adapters, wan_pipeline, wan_pipeline, "--schedule", "1x4x4:3,1x2x2:2") == 2
    assert "would be lost" in capsys.readouterr().err
    assert not (wan_pipeline / "transformer").exists()
