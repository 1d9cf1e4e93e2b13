from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

from flexidit import create_model, flexify, load_checkpoint, save_checkpoint
from flexidit.cli import main
from flexidit.commands import convert
from flexidit.conditions import Captions
from flexidit.models import DiT, FlexiTransformer

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


def saved(model: FlexiTransformer, folder: Path, layout: str = "flexidit") -> str:
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


@pytest.mark.parametrize("to", list(OUTPUTS))
def test_only_our_own_layout_tells_the_process(build: Build, to: str, tmp_path: Path, capsys: Any) -> None:
    flow = {"process": "flow", "time_shift": 3.0, "learn_sigma": False, "frequency_shift": int(to == "diffusers")}
    source, target = saved(build(config=flow), tmp_path), tmp_path / OUTPUTS[to]
    assert main(["convert", source, str(target), "--to", to]) == 0
    err = capsys.readouterr().err
    assert ("process=diffusion, time_shift=1.0" in err) == (to != "flexidit")
    told = {name: flow[name] for name in ("process", "time_shift")} | {"num_heads": 4}
    assert (found := load_checkpoint(target, **told).config).process == "flow" and found.time_shift == 3.0


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


TEXT: dict[str, Any] = {"input_size": 8, "hidden_size": 48, "num_heads": 4, "caption_channels": 40}


def test_every_layout_of_text_models_to_every_other(
    randomised: Callable[..., nn.Module], tmp_path: Path, capsys: Any
) -> None:
    model = create_model("TextDiT-Tiny/2", **TEXT).eval()
    randomised(model)
    for source in OUTPUTS:
        for to in OUTPUTS:
            target = tmp_path / f"{source}_{OUTPUTS[to]}"
            line = ["convert", saved(model, tmp_path, source), str(target), "--to", to, "--num-heads", "4"]
            assert main(line) == 0
            loaded = load_checkpoint(target, num_heads=4)
            assert loaded.config == model.config
            assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    err = capsys.readouterr().err
    assert set(err.splitlines()) == {
        "flexidit convert: the official layout does not hold everything: readers must be told num_heads=4"
    }


WAN: dict[str, Any] = {"input_size": (4, 8, 8), "caption_length": 512}
WAN_OUTPUTS = {**OUTPUTS, "official": "model.safetensors"}


def test_every_layout_of_a_wan_to_every_other(
    randomised: Callable[..., nn.Module], tmp_path: Path, capsys: Any
) -> None:
    model = create_model("Wan-Tiny", **WAN).eval()
    randomised(model)
    for source in WAN_OUTPUTS:
        origin = save_checkpoint(model, tmp_path / f"{source}_in_{WAN_OUTPUTS[source]}", layout_format=source)  # type: ignore[arg-type]
        for to in WAN_OUTPUTS:
            target = tmp_path / f"{source}_{to}_{WAN_OUTPUTS[to]}"
            line = ["convert", str(origin), str(target), "--to", to, "--num-heads", "4", "--input-size", "4x8x8"]
            assert main(line) == 0
            loaded = load_checkpoint(target, num_heads=4, input_size=(4, 8, 8))
            assert loaded.config == model.config
            assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    captured = capsys.readouterr()
    assert "plain Wan, 2 blocks of width 64, patch 1x2x2, latent 1x4x8x8, captions of 512 x 64" in captured.out
    assert set(captured.err.splitlines()) == {
        f"flexidit convert: the {layout} layout does not hold everything: {told}readers told nothing take "
        "input_size=(21, 60, 104)"
        for layout, told in (("official", "readers must be told num_heads=4; "), ("diffusers", ""))
    }


@pytest.mark.parametrize("size", ["1x4x4", "2x2x2"])
def test_stock_diffusers_computes_the_merged_weak_size_of_a_wan(
    size: str, randomised: Callable[..., nn.Module], tmp_path: Path, capsys: Any
) -> None:
    target = create_model("Wan-Tiny", **{**WAN, "input_size": (5, 8, 8)})
    randomised(target)
    student = flexify(target, ["1x4x4", "2x2x2"], recipe="lora", rank=2, positions="grid").eval()
    randomised(student, seed=1)
    line = ["convert", saved(student, tmp_path), str(tmp_path / "out"), "--to", "merged", "--patch-size", size]
    assert main(line) == (0 if size == "1x4x4" else 2)
    assert ("2x2x2 does not divide latent clips of 5x8x8" in capsys.readouterr().err) == (size == "2x2x2")
    assert main([*line, "--input-size", "8x8"]) == 2
    assert "give --input-size as FxHxW, such as 5x8x8" in capsys.readouterr().err
    assert main([*line, "--input-size", "6x8x8"]) == 0
    peer, x = WanTransformer3DModel.from_pretrained(tmp_path / "out"), torch.randn(2, 1, 6, 8, 8)
    y = Captions(torch.randn(2, 512, 64), torch.ones(2, 512, dtype=torch.bool))
    with torch.no_grad():
        expected = student(x, T, y, patch_size=size)
        torch.testing.assert_close(peer(x, T, y.embeddings).sample, expected, atol=1e-5, rtol=1e-5)


def test_sizes_of_latents_are_read_in_three_forms() -> None:
    assert [convert._latent_size(text) for text in ("8", "8x12", "21x60x104")] == [8, (8, 12), (21, 60, 104)]
    for text in ("", "8x", "0x8", "a", "1x2x3x4", "-8"):
        with pytest.raises(argparse.ArgumentTypeError, match="give N, HxW or"):
            convert._latent_size(text)


def test_pixart_weights_without_positions(randomised: Callable[..., nn.Module], tmp_path: Path, capsys: Any) -> None:
    model = create_model("TextDiT-Tiny/2", **TEXT, null_caption=False).eval()
    randomised(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "pos_embed"}
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    line = ["convert", str(tmp_path / "model.pth"), str(tmp_path / "out"), "--to", "diffusers", "--num-heads", "4"]
    assert main(line) == 2
    assert "give input_size" in capsys.readouterr().err
    assert main([*line, "--input-size", "8"]) == 0
    assert "plain TextDiT, 2 blocks" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out").input_size == (8, 8)


def test_a_caption_length_that_no_file_tells_is_a_warning(
    randomised: Callable[..., nn.Module], tmp_path: Path, capsys: Any
) -> None:
    model = create_model("TextDiT-Tiny/2", **TEXT, null_caption=False).eval()
    randomised(model)
    assert main(["convert", saved(model, tmp_path), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    err = capsys.readouterr().err
    assert "readers told nothing take caption_length=120" in err and err.count("\n") == 1


@pytest.mark.parametrize("recipe", [None, "shared"])
def test_models_without_adapters_have_none_to_write(
    build: Build, recipe: str | None, tmp_path: Path, capsys: Any
) -> None:
    source = saved(build(recipe), tmp_path)
    assert main(["convert", source, str(tmp_path / "out"), "--to", "peft"]) == 2
    assert f"this model is {recipe or 'plain'} and has no adapters" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path / "out"), "--to", "diffusers", "--base", source]) == 2
    assert "needs no base" in capsys.readouterr().err
    if recipe is None:
        assert main(["convert", source, str(tmp_path / "out"), "--to", "merged"]) == 2
        assert "no weak patch size to merge" in capsys.readouterr().err


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


@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_read_is_never_written_over(
    build: Build, recorded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.safetensors"
    save_checkpoint(build(), base)
    student = flexify(load_checkpoint(base), [4], recipe="lora", rank=2)
    source = tmp_path / "adapters.safetensors"
    save_checkpoint(student, source, adapters_only=True, base_source=str(base))
    target = base if recorded else source
    before = target.read_bytes()
    assert main(["convert", str(source), str(target), "--to", "flexidit", "--adapters-only"]) == 2
    assert "would be lost" in capsys.readouterr().err
    assert target.read_bytes() == before
