"""What `flexidit convert` makes of a distilled student: adapters for peft, a merged weak size for stock diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from flexidit import create_model, flexify, load_checkpoint, save_checkpoint
from flexidit.checkpoint import recorded_text
from flexidit.cli import main
from flexidit.conditions import Captions
from flexidit.config import config_to_dict
from flexidit.identity import added_tensors, base_hash
from flexidit.models import TextDiT

T = torch.tensor([3, 500])
TEXT: dict[str, Any] = {"input_size": 8, "hidden_size": 48, "num_heads": 4, "caption_channels": 40}


class Engineer:
    """A distilled text-to-image student, as training left it: a target file and a checkpoint of adapters."""

    def __init__(self, folder: Path, randomised: Callable[..., nn.Module], weak: list[int], **config: Any) -> None:
        target = create_model("TextDiT-Tiny/2", **{**TEXT, **config})
        randomised(target)
        self.target = str(save_checkpoint(target, folder / "target.safetensors"))
        student = flexify(target, weak, recipe="lora", rank=2, positions="corners").eval()
        assert isinstance(student, TextDiT)
        self.student, self.checkpoint, self.out = student, str(folder / "last.ckpt"), folder / "out"
        randomised(student, seed=1)
        self.text = {"encoder": "words"}
        self.write({"hash": base_hash(student), "source": None})

    def write(self, base: dict[str, Any]) -> None:
        added = {f"model.{name}": tensor for name, tensor in added_tensors(self.student.state_dict()).items()}
        facts = {"config": config_to_dict(self.student.config), "base": base, "text": self.text}
        torch.save({"state_dict": added, "flexidit": facts}, self.checkpoint)

    def convert(self, *line: str, output: Path | None = None) -> int:
        return main(["convert", self.checkpoint, str(output or self.out), *line])


@pytest.fixture
def engineer(tmp_path: Path, randomised: Callable[..., nn.Module]) -> Engineer:
    return Engineer(tmp_path, randomised, [4])


def captions() -> Captions:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return Captions(torch.randn(2, 5, 40), mask)


def test_adapters_for_peft_and_back(engineer: Engineer, capsys: Any) -> None:
    assert engineer.convert("--to", "peft", "--base", engineer.target) == 0
    out = capsys.readouterr().out
    assert "adapters of a flexible (lora) TextDiT, 2 blocks of width 48, patch 1x2x2, 1x4x4, latent 4x8x8" in out
    assert "captions of 16 x 40" in out and f"base    {engineer.target}, weights " in out
    loaded, x, y = load_checkpoint(engineer.out), torch.randn(2, 4, 8, 8), captions()
    for size in (2, 4):
        assert torch.equal(loaded(x, T, y, patch_size=size), engineer.student(x, T, y, patch_size=size))
    assert load_checkpoint(engineer.out, base=engineer.target).config == engineer.student.config


def test_adapters_can_be_written_where_the_base_is_not(engineer: Engineer, capsys: Any, tmp_path: Path) -> None:
    Path(engineer.target).rename(tmp_path / "elsewhere.safetensors")
    assert engineer.convert("--to", "peft") == 0
    captured = capsys.readouterr()
    assert "nothing says where the base is" in captured.err and captured.err.count("\n") == 1
    assert "base    not recorded where" in captured.out
    loaded = load_checkpoint(engineer.out, tmp_path / "elsewhere.safetensors").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in engineer.student.state_dict().items())


@pytest.mark.parametrize("source", ["full.safetensors", "adapters.safetensors", "out"])
def test_adapters_of_every_kind_of_file(engineer: Engineer, source: str, tmp_path: Path, capsys: Any) -> None:
    base = ["--base", engineer.target]
    ways = {"full.safetensors": ["flexidit"], "adapters.safetensors": ["flexidit", "--adapters-only"], "out": ["peft"]}
    assert engineer.convert("--to", *ways[source], *base, output=tmp_path / source) == 0
    again = tmp_path / "again"
    assert main(["convert", str(tmp_path / source), str(again), "--to", "peft", "--json", *base]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["base"] == {"hash": base_hash(engineer.student), "source": engineer.target}
    assert report["tensors_compared"] == len(added_tensors(engineer.student.state_dict()))
    assert recorded_text(tmp_path / source) == recorded_text(again) == engineer.text
    loaded = load_checkpoint(again).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in engineer.student.state_dict().items())


@pytest.mark.parametrize("micro", [False, True])
def test_stock_diffusers_computes_the_merged_weak_size(
    micro: bool, tmp_path: Path, randomised: Callable[..., nn.Module], capsys: Any
) -> None:
    options: dict[str, Any] = {"micro_conditions": micro, "position_scale": 2.0, "input_size": 16}
    engineer = Engineer(tmp_path, randomised, [4], **options)
    assert engineer.convert("--to", "merged", "--base", engineer.target) == 0
    assert capsys.readouterr().err == ""
    peer = PixArtTransformer2DModel.from_pretrained(engineer.out).eval()
    assert (peer.config.patch_size, peer.config.interpolation_scale) == (4, 1)
    back, y = load_checkpoint(engineer.out), captions()
    for height, width in ((16, 16), (24, 16), (8, 12)):
        x, ratio = torch.randn(2, 4, height, width), torch.tensor([[height / width]] * 2)
        pixels = {"resolution": torch.tensor([[8.0 * height, 8.0 * width]] * 2), "aspect_ratio": ratio}
        with torch.no_grad():
            expected = engineer.student(x, T, y, patch_size=4)
            theirs = peer(x, y.embeddings, T, pixels if micro else None, encoder_attention_mask=y.mask.float()).sample
            torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(back(x, T, y, patch_size=4), expected, atol=1e-5, rtol=1e-5)


def test_of_several_weak_sizes_one_must_be_chosen(
    tmp_path: Path, randomised: Callable[..., nn.Module], capsys: Any
) -> None:
    engineer = Engineer(tmp_path, randomised, [4, 8])
    assert engineer.convert("--to", "merged", "--base", engineer.target) == 2
    assert "choose one of 1x4x4, 1x8x8 with --patch-size" in capsys.readouterr().err
    for layout in ("merged", "diffusers"):  # two names of one thing, where the size is said
        line = ["--to", layout, "--patch-size", "8", "--base", engineer.target]
        assert engineer.convert(*line, output=tmp_path / layout) == 0
        assert PixArtTransformer2DModel.from_pretrained(tmp_path / layout).config.patch_size == 8


@pytest.mark.parametrize("layout", ["flexidit", "official", "diffusers", "peft"])
def test_any_precision(engineer: Engineer, layout: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / {"flexidit": "a.safetensors", "official": "a.pth"}.get(layout, "a")
    size = ["--patch-size", "2"] if layout in ("official", "diffusers") else []
    line = ["--to", layout, "--base", engineer.target, "--dtype", "bfloat16", "--json", *size]
    assert engineer.convert(*line, output=output) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["read"]["dtype"], report["written"]["dtype"]) == ("float32", "bfloat16")
    if layout == "peft":
        return
    state = load_checkpoint(output, num_heads=4).state_dict()
    expected = engineer.student.state_dict()
    shared = [name for name in state if name in expected and name != "pos_embed"]
    assert shared and all(torch.equal(state[name], expected[name].bfloat16()) for name in shared)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--to peft --patch-size 4", "leave --patch-size out"),
        ("--to official --adapters-only", "--adapters-only is for --to flexidit"),
        ("--to merged", "does not say where their base is; give it (base=, --base)"),
        ("--to merged --base gone.pth", "no checkpoint at gone.pth"),
        ("--to peft --base {other}", "is not the base that the adapters"),
    ],
)
def test_refusals_about_adapters(engineer: Engineer, line: str, sentence: str, tmp_path: Path, capsys: Any) -> None:
    other = save_checkpoint(create_model("TextDiT-Tiny/2", **TEXT), tmp_path / "other.safetensors")
    assert engineer.convert(*line.format(other=other).split()) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not engineer.out.exists()
