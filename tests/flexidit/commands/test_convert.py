from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from flexidit import create_model, flexify, load_checkpoint, save_checkpoint
from flexidit.cli import main
from flexidit.commands import convert
from flexidit.models.dit import DiT

OUTPUTS = {"flexidit": "model.safetensors", "official": "model.pt", "diffusers": "folder"}
T, Y = torch.tensor([3, 500]), torch.tensor([1, 9])

Build = Callable[..., DiT]


@pytest.fixture
def build(randomised: Callable[..., nn.Module]) -> Build:
    """A random model; ``recipe`` makes it flexible."""

    def make(recipe: str | None = None, config: dict[str, Any] | None = None, **options: Any) -> DiT:
        model = create_model("DiT-Tiny/2", **{"input_size": 8, "num_classes": 10, **(config or {})})
        randomised(model)
        if recipe is not None:
            model = flexify(model, [4], recipe=recipe, rank=2, **options)  # type: ignore[arg-type]
            randomised(model, seed=1)
        return model.eval()

    return make


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 8, 8)


def saved(model: DiT, folder: Path, layout: str = "flexidit") -> str:
    return str(save_checkpoint(model, folder / f"in_{OUTPUTS[layout]}", layout_format=layout))  # type: ignore[arg-type]


@pytest.mark.parametrize("to", list(OUTPUTS))
@pytest.mark.parametrize("layout", list(OUTPUTS))
def test_any_layout_to_any_keeps_every_tensor(build: Build, layout: str, to: str, tmp_path: Path, capsys: Any) -> None:
    model = build()
    source, target = saved(model, tmp_path, layout), tmp_path / OUTPUTS[to]
    heads = ["--num-heads", "4"] if layout == "official" else []
    assert main(["convert", source, str(target), "--to", to, "--json", *heads]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["read"]["parameters"] == report["written"]["parameters"] == sum(p.numel() for p in model.parameters())
    again = load_checkpoint(target, **({"num_heads": 4} if to == "official" else {})).state_dict()
    assert report["tensors_compared"] == len(again)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0)


def test_it_says_what_it_read_and_wrote(build: Build, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "model.safetensors"
    assert main(["convert", saved(build("lora"), tmp_path), str(target), "--to", "flexidit"]) == 0
    out = capsys.readouterr().out
    assert "flexible (lora) DiT, 2 blocks of width 64, patch 1x2x2, 1x4x4, latent 4x8x8, 10 classes" in out
    assert f"{target.stat().st_size / 1e6:.1f} MB; read back" in out


@pytest.mark.parametrize(("recipe", "patch_size"), [("shared", 2), ("lora", 2), ("lora", 4)])
def test_one_patch_size_of_a_flexible_model(
    build: Build, x: Tensor, recipe: str, patch_size: int, tmp_path: Path, capsys: Any
) -> None:
    student, target = build(recipe), tmp_path / "model.pt"
    line = ["convert", saved(student, tmp_path), str(target), "--to", "official", "--patch-size", str(patch_size)]
    assert main(line) == 0
    assert "readers must be told num_heads=4" in capsys.readouterr().err
    plain = load_checkpoint(target, num_heads=4)
    assert plain.config.flex is None
    expected = student(x, T, Y, patch_size=patch_size)
    torch.testing.assert_close(plain(x, T, Y, patch_size=patch_size), expected, atol=1e-5, rtol=1e-5)


def test_diffusers_itself_computes_the_merged_weak_size(build: Build, x: Tensor, tmp_path: Path, capsys: Any) -> None:
    theirs = {"frequency_shift": 1, "mlp_norm_eps": 1e-5}
    student = build("lora", theirs, positions="grid")
    folder = tmp_path / "folder"
    line = ["convert", saved(student, tmp_path), str(folder), "--to", "diffusers", "--patch-size", "4"]
    assert main(line) == 0
    assert capsys.readouterr().err == ""
    peer = DiTTransformer2DModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = student(x, T, Y, patch_size=4)
        torch.testing.assert_close(peer(x, T, Y).sample, expected, atol=1e-4, rtol=1e-4)


def test_what_diffusers_computes_otherwise_is_a_warning(build: Build, tmp_path: Path, capsys: Any) -> None:
    assert main(["convert", saved(build(), tmp_path), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    err = capsys.readouterr().err
    assert "frequency_shift=1" in err and err.count("\n") == 1


def test_what_the_official_layout_forgets_is_a_warning(build: Build, tmp_path: Path, capsys: Any) -> None:
    model = build(config={"frequency_shift": 1, "input_size": (8, 4)})
    assert main(["convert", saved(model, tmp_path), str(tmp_path / "model.pt"), "--to", "official"]) == 0
    err = capsys.readouterr().err
    assert "frequency_shift=0" in err and "input_size" in err and "num_heads=4" in err


@pytest.mark.parametrize("option", [[], ["--no-ema"]])
def test_averaged_weights_are_preferred(build: Build, option: list[str], tmp_path: Path) -> None:
    state = build().state_dict()
    torch.save({"model": state, "ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "train.pt")
    target = tmp_path / "model.safetensors"
    line = ["convert", str(tmp_path / "train.pt"), str(target), "--to", "flexidit", "--num-heads", "4"]
    assert main([*line, *option]) == 0
    added = load_checkpoint(target).state_dict()["pos_embed"] - state["pos_embed"]
    torch.testing.assert_close(added, torch.full_like(added, 0.0 if option else 1.0))


def test_an_error_on_the_way_back_is_found(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = build()
    with torch.no_grad():
        other.final_layer.linear.bias += 1
    monkeypatch.setattr("flexidit.checkpoint.load_checkpoint", lambda *args, **kwargs: other)
    with pytest.raises(ValueError, match=r"read back.*final_layer.linear.bias"):
        convert._verify(build(), tmp_path, {}, "flexidit")


@pytest.mark.parametrize(
    ("recipe", "line", "sentence"),
    [
        (None, "missing.safetensors {out}.safetensors --to flexidit", "no checkpoint at missing.safetensors"),
        (None, "{in} {out} --to flexidit", "ends in .safetensors"),
        (None, "{in} {out}.safetensors --to diffusers", "is a folder"),
        (None, "{in} {out}.safetensors --to flexidit --patch-size 4", "no patch size 1x4x4"),
        (None, "{in} {out}.safetensors --to flexidit --num-heads 8", "says num_heads=4, not 8"),
        ("lora", "{in} {out}.pt --to official", "choose one of 1x2x2, 1x4x4 with --patch-size"),
        ("lora", "{in} {out} --to diffusers --patch-size 4", "positions='grid'"),
        ("shared", "{in} {out}.pt --to official --patch-size 4", "layer norms of its own"),
    ],
)
def test_refusals(build: Build, recipe: str | None, line: str, sentence: str, tmp_path: Path, capsys: Any) -> None:
    places = {"in": saved(build(recipe), tmp_path), "out": str(tmp_path / "out")}
    assert main(["convert", *line.format(**places).split()]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_inputs_that_patches_do_not_divide_stay_out_of_diffusers(build: Build, tmp_path: Path, capsys: Any) -> None:
    model = build(config={"input_size": (7, 7)})
    assert main(["convert", saved(model, tmp_path), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert "takes whole patches" in capsys.readouterr().err
