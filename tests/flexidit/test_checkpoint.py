from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from flexidit import create_model, flexify, load_checkpoint, save_checkpoint
from flexidit.models.dit import DiT

Randomise = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def target(randomised: Randomise) -> DiT:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    randomised(model)
    return model.eval()


def outputs(model: DiT) -> list[Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [model(x, torch.tensor([3, 500]), torch.tensor([1, 9]), patch_size=size) for size in model.patch_sizes]


def assert_same(a: DiT, b: DiT) -> None:
    assert a.config == b.config
    assert all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))
    assert [n for n, p in a.named_parameters() if p.requires_grad] == [
        n for n, p in b.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("recipe", ["shared", "lora"])
def test_a_flexible_model_comes_back_as_it_was(target: DiT, recipe: str, tmp_path: Path) -> None:
    student = flexify(target, [4, 8], recipe=recipe, rank=4, positions="grid").eval()  # type: ignore[arg-type]
    assert_same(load_checkpoint(save_checkpoint(student, tmp_path / "model.safetensors")), student)


def test_official_layout_both_ways(target: DiT, tmp_path: Path) -> None:
    save_checkpoint(target, tmp_path / "model.pt", layout_format="official")
    assert_same(load_checkpoint(tmp_path / "model.pt", num_heads=4), target)


@pytest.mark.parametrize("prefer_ema", [True, False])
def test_training_checkpoints_of_dit_prefer_the_average(target: DiT, prefer_ema: bool, tmp_path: Path) -> None:
    ema = {name: tensor + 1 for name, tensor in target.state_dict().items()}
    saved = {"model": target.state_dict(), "ema": ema, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(saved, tmp_path / "0050000.pt")
    state = load_checkpoint(tmp_path / "0050000.pt", prefer_ema=prefer_ema, num_heads=4).state_dict()
    expected = ema if prefer_ema else target.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_lightning_checkpoints_prefer_the_average(target: DiT, tmp_path: Path) -> None:
    from flexidit.config import config_to_dict

    average = {"model.final_layer.linear.bias": torch.full((32,), 7.0)}
    saved = {
        "state_dict": {f"model.{name}": tensor for name, tensor in target.state_dict().items()},
        "callbacks": {"EMA": {"average": average}},
        "flexidit": {"config": config_to_dict(target.config)},
    }
    torch.save(saved, tmp_path / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(loaded.final_layer.linear.bias, torch.full((32,), 7.0))
    assert torch.equal(loaded.x_embedder.proj.weight, target.x_embedder.proj.weight)
    assert_same(load_checkpoint(tmp_path / "last.ckpt", prefer_ema=False), target)


def test_diffusers_directory_both_ways(target: DiT, tmp_path: Path) -> None:
    save_checkpoint(target, tmp_path / "transformer", layout_format="diffusers")
    peer = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    ours = load_checkpoint(tmp_path)  # the directory of a pipeline: its transformer is found
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 9])
    theirs = peer.double()(x.double(), t, y).sample
    torch.testing.assert_close(ours.double()(x.double(), t, y, patch_size=2), theirs, atol=1e-5, rtol=1e-5)


def test_diffusers_own_checkpoint_of_several_files(tmp_path: Path) -> None:
    peer = DiTTransformer2DModel(4, 16, num_layers=2, sample_size=8, num_embeds_ada_norm=10, out_channels=8)
    state = peer.state_dict()
    for i in range(2):  # as trained ones have it: all blocks share their embeddings
        for name in [n for n in state if n.startswith(f"transformer_blocks.{i}.norm1.emb")]:
            state[name].copy_(state[name.replace(f"blocks.{i}.", "blocks.0.")])
    peer.eval().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 9])
    ours = load_checkpoint(tmp_path).double()(x.double(), t, y, patch_size=2)
    torch.testing.assert_close(ours, peer.double()(x.double(), t, y).sample, atol=1e-5, rtol=1e-5)


def test_flexible_models_do_not_fit_single_size_layouts(target: DiT, tmp_path: Path) -> None:
    for layout in ("official", "diffusers"):
        with pytest.raises(ValueError, match="one patch size"):
            save_checkpoint(flexify(target, [4]), tmp_path / "x", layout_format=layout)  # type: ignore[arg-type]


def test_a_failed_save_leaves_the_old_file_and_no_other(
    target: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(target, tmp_path / "model.safetensors")
    before = path.read_bytes()

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("flexidit.checkpoint.save_file", broken)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(target, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_damaged_and_foreign_files_are_named(target: DiT, tmp_path: Path) -> None:
    path = save_checkpoint(target, tmp_path / "model.safetensors")
    half = tmp_path / "half.safetensors"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half\.safetensors is damaged"):
        load_checkpoint(half)
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"noise\.pt"):
        load_checkpoint(tmp_path / "noise.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        load_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="UNet2DModel"):
        load_checkpoint(tmp_path)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('pwned').write_text('x')",)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Hostile()}, "hostile.pt")
    with pytest.raises(ValueError, match=r"hostile.pt holds objects.*refused"):
        load_checkpoint("hostile.pt")
    assert not Path("pwned").exists()


def test_a_real_unsafe_checkpoint_is_refused(test_data: Path) -> None:
    files = [p for p in (test_data / "lightning_ckpts").rglob("*") if p.suffix == ".ckpt"]
    assert files
    for path in files:
        with pytest.raises(ValueError, match=path.name):
            load_checkpoint(path)


def test_missing_tensors_are_named(target: DiT, tmp_path: Path) -> None:
    state = target.state_dict()
    del state["blocks.1.attn.proj.bias"]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.bias"):
        load_checkpoint(tmp_path / "model.pt", num_heads=4)
