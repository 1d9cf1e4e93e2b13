from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from flexidit import create_model, flexify, load_checkpoint, save_checkpoint
from flexidit.checkpoint import Format, computed_positions, recorded_text
from flexidit.conditions import Captions
from flexidit.config import config_to_dict
from flexidit.identity import added_tensors, base_hash
from flexidit.models import DiT, FlexiTransformer, TextDiT

Randomise = Callable[..., nn.Module]
TEXT: dict[str, Any] = {"input_size": 8, "hidden_size": 48, "num_heads": 4, "caption_channels": 40}


@pytest.fixture(scope="module")
def target(randomised: Randomise) -> DiT:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    randomised(model)
    return model.eval()


@pytest.fixture(scope="module")
def text_target(randomised: Randomise) -> TextDiT:
    model = create_model("TextDiT-Tiny/2", **TEXT)
    randomised(model)
    assert isinstance(model, TextDiT)
    return model.eval()


@pytest.fixture(params=["DiT", "TextDiT"])
def either(request: pytest.FixtureRequest, target: DiT, text_target: TextDiT) -> FlexiTransformer:
    return target if request.param == "DiT" else text_target


def outputs(model: FlexiTransformer) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    y: Any = torch.tensor([1, 9])
    if isinstance(model, TextDiT):
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        y = Captions(torch.randn(2, 5, model.config.caption_channels, generator=generator), mask)
    dtype = model.pos_embed.dtype
    return [model(x.to(dtype), torch.tensor([3, 500]), y, patch_size=size) for size in model.patch_sizes]


def assert_same(a: FlexiTransformer, b: FlexiTransformer) -> None:
    assert a.config == b.config
    assert all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))
    assert [n for n, p in a.named_parameters() if p.requires_grad] == [
        n for n, p in b.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("recipe", ["shared", "lora"])
def test_a_flexible_model_comes_back_as_it_was(either: FlexiTransformer, recipe: Any, tmp_path: Path) -> None:
    student = flexify(either, [4, 8], recipe=recipe, rank=4, positions="grid").eval()
    assert_same(load_checkpoint(save_checkpoint(student, tmp_path / "model.safetensors")), student)


@pytest.mark.parametrize("position", range(0, 64, 8))
def test_outputs_do_not_depend_on_where_in_a_file_weights_lie(target: DiT, position: int, tmp_path: Path) -> None:
    student = flexify(target, [4, 8], positions="grid").eval()
    header = {"flexidit": json.dumps(config_to_dict(student.config)) + " " * position}
    tensors = {name: tensor.detach() for name, tensor in student.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors", header)
    assert_same(load_checkpoint(tmp_path / "a.safetensors"), student)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"position_table": "learned", "qk_norm": True}, {"micro_conditions": True}, {"null_caption": False}],
)
def test_options_of_text_models_come_back(overrides: dict[str, Any], randomised: Randomise, tmp_path: Path) -> None:
    model = create_model("TextDiT-Tiny/2", **{**TEXT, **overrides}).eval()
    randomised(model)
    for kind in ("plain", "lora", "shared"):
        other = model if kind == "plain" else flexify(model, [4], recipe=kind, rank=2)  # type: ignore[arg-type]
        assert_same(load_checkpoint(save_checkpoint(other, tmp_path / "model.safetensors")), other)


def test_official_layout_both_ways(either: FlexiTransformer, tmp_path: Path) -> None:
    save_checkpoint(either, tmp_path / "model.pt", layout_format="official")
    assert_same(load_checkpoint(tmp_path / "model.pt", num_heads=4), either)


def test_official_weights_without_positions_need_the_size(text_target: TextDiT, tmp_path: Path) -> None:
    state = text_target.state_dict()
    del state["pos_embed"]
    torch.save({"state_dict": {name: tensor.half() for name, tensor in state.items()}}, tmp_path / "PixArt.pth")
    with pytest.raises(ValueError, match=r"PixArt\.pth: .*give input_size"):
        load_checkpoint(tmp_path / "PixArt.pth", num_heads=4)
    model = load_checkpoint(tmp_path / "PixArt.pth", num_heads=4, input_size=8)
    assert model.config == text_target.config
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    assert_same(model.float(), copy.deepcopy(text_target).half().float())


@pytest.mark.parametrize("prefer_ema", [True, False])
def test_training_checkpoints_of_pixart_prefer_the_average(
    text_target: TextDiT, prefer_ema: bool, tmp_path: Path
) -> None:
    ema = {name: tensor if name == "pos_embed" else tensor + 1 for name, tensor in text_target.state_dict().items()}
    saved = {"state_dict": text_target.state_dict(), "state_dict_ema": ema, "epoch": 3, "optimizer": {}}
    torch.save(saved, tmp_path / "epoch_3.pth")
    state = load_checkpoint(tmp_path / "epoch_3.pth", prefer_ema=prefer_ema, num_heads=4).state_dict()
    expected = ema if prefer_ema else text_target.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("prefer_ema", [True, False])
def test_training_checkpoints_of_dit_prefer_the_average(target: DiT, prefer_ema: bool, tmp_path: Path) -> None:
    ema = {name: tensor + 1 for name, tensor in target.state_dict().items()}
    saved = {"model": target.state_dict(), "ema": ema, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(saved, tmp_path / "0050000.pt")
    state = load_checkpoint(tmp_path / "0050000.pt", prefer_ema=prefer_ema, num_heads=4).state_dict()
    expected = ema if prefer_ema else target.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_lightning_checkpoints_prefer_the_average(target: DiT, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("null_caption", [True, False])
def test_pixart_directory_both_ways(null_caption: bool, randomised: Randomise, tmp_path: Path, capfd: Any) -> None:
    model = create_model("TextDiT-Tiny/2", **{**TEXT, "caption_length": 120}, null_caption=null_caption).eval()
    randomised(model)
    save_checkpoint(model, tmp_path / "transformer", layout_format="diffusers")
    assert (tmp_path / "transformer" / "null_caption.safetensors").is_file() == null_caption
    peer, info = PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(info.values())
    assert "null_caption" not in str(capfd.readouterr())  # stock diffusers does not even mention the file
    ours = load_checkpoint(tmp_path)
    assert ours.config == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ours.state_dict().items())
    peer.save_pretrained(tmp_path / "again")
    again = load_checkpoint(tmp_path / "again", caption_length=16)
    assert again.config == replace(model.config, null_caption=False, caption_length=16)


def test_weights_in_half_precision_stay_so(text_target: TextDiT, tmp_path: Path) -> None:
    half = copy.deepcopy(text_target).bfloat16()
    layouts: dict[Format, str] = {"flexidit": "a.safetensors", "official": "a.pth", "diffusers": "a"}
    for layout, name in layouts.items():
        loaded = load_checkpoint(save_checkpoint(half, tmp_path / name, layout_format=layout), num_heads=4)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
        assert all(torch.equal(a, b) for a, b in zip(outputs(loaded), outputs(half), strict=True))


def test_loading_draws_no_random_numbers(either: FlexiTransformer, tmp_path: Path) -> None:
    path = save_checkpoint(either, tmp_path / "folder", layout_format="diffusers")
    before = torch.get_rng_state()
    load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(computed_positions(either.config), either.pos_embed.detach())


class Distilled:
    """A student of the lora recipe whose adapters are not zero, and the checkpoint that its training would write."""

    def __init__(self, target: FlexiTransformer, folder: Path, randomised: Randomise) -> None:
        self.target = save_checkpoint(target, folder / "target.safetensors")
        self.student = flexify(target, [4, 8], recipe="lora", rank=2).eval()
        randomised(self.student)
        self.identity = {"hash": base_hash(self.student), "source": str(self.target)}
        self.path = folder / "last.ckpt"

    def write(self, text: dict[str, Any] | None = None, **changes: Any) -> Path:
        added = {f"model.{name}": tensor for name, tensor in added_tensors(self.student.state_dict()).items()}
        average = {name: tensor.double() + 1 for name, tensor in added.items()}
        base = {**self.identity, **changes}
        facts = {"config": config_to_dict(self.student.config), "base": base, "text": text}
        torch.save({"state_dict": added, "callbacks": {"EMA": {"average": average}}, "flexidit": facts}, self.path)
        return self.path


@pytest.fixture
def distilled(either: FlexiTransformer, tmp_path: Path, randomised: Randomise) -> Distilled:
    return Distilled(either, tmp_path, randomised)


def test_adapters_of_training_find_their_base(distilled: Distilled, tmp_path: Path) -> None:
    assert_same(load_checkpoint(distilled.write(), prefer_ema=False), distilled.student)
    distilled.write(source=None)
    assert_same(load_checkpoint(distilled.path, distilled.target, prefer_ema=False), distilled.student)
    full = save_checkpoint(distilled.student, tmp_path / "full.safetensors")
    assert_same(load_checkpoint(distilled.path, base=full, prefer_ema=False), distilled.student)


def test_adapters_of_training_prefer_the_average(distilled: Distilled) -> None:
    loaded = load_checkpoint(distilled.write()).state_dict()
    for name, tensor in distilled.student.state_dict().items():
        is_added = name in added_tensors({name: tensor})
        assert torch.equal(loaded[name], tensor + 1 if is_added else tensor)


def test_adapters_alone_come_back(distilled: Distilled, tmp_path: Path) -> None:
    path = tmp_path / "adapters.safetensors"
    save_checkpoint(distilled.student, path, adapters_only=True, base_source=str(distilled.target))
    assert path.stat().st_size < 0.6 * save_checkpoint(distilled.student, tmp_path / "full.safetensors").stat().st_size
    assert_same(load_checkpoint(path), distilled.student)


def test_an_official_base_needs_no_options(distilled: Distilled, either: FlexiTransformer, tmp_path: Path) -> None:
    path = save_checkpoint(distilled.student, tmp_path / "adapters.safetensors", adapters_only=True)
    official = save_checkpoint(either, tmp_path / "target.pth", layout_format="official")
    assert_same(load_checkpoint(path, official), distilled.student)  # the student knows its number of heads


def test_the_text_encoder_of_training_is_told(distilled: Distilled, tmp_path: Path) -> None:
    text = {"encoder": "T5", "max_length": 120}
    assert recorded_text(distilled.write()) is None
    assert recorded_text(distilled.write(text=text, source="gone.pth")) == text
    for adapters_only in (True, False):
        path = tmp_path / "model.safetensors"
        save_checkpoint(distilled.student, path, adapters_only=adapters_only, text=text)
        assert recorded_text(path) == text
    assert recorded_text(save_checkpoint(distilled.student, tmp_path / "none.safetensors")) is None
    assert (
        recorded_text(save_checkpoint(load_checkpoint(distilled.target), tmp_path / "a", layout_format="diffusers"))
        is None
    )


def test_a_base_in_half_precision_is_widened_to_what_was_trained(
    either: FlexiTransformer, randomised: Randomise, tmp_path: Path
) -> None:
    half = save_checkpoint(copy.deepcopy(either).half(), tmp_path / "half.safetensors")
    student = flexify(load_checkpoint(half).float(), [4], recipe="lora", rank=2)
    randomised(student)
    path = save_checkpoint(student, tmp_path / "adapters.safetensors", adapters_only=True, base_source=str(half))
    assert_same(load_checkpoint(path), student)


def test_another_base_is_refused(distilled: Distilled, either: FlexiTransformer, tmp_path: Path) -> None:
    other = copy.deepcopy(either)
    with torch.no_grad():
        other.blocks[1].mlp.fc1.bias[0] += 1e-3
    save_checkpoint(other, distilled.target)
    with pytest.raises(ValueError, match=r"target.safetensors is not the base that the adapters in .*last.ckpt were"):
        load_checkpoint(distilled.write())


def test_a_missing_base_is_named(distilled: Distilled) -> None:
    with pytest.raises(ValueError, match=r"last.ckpt holds adapters only and does not say where.*base="):
        load_checkpoint(distilled.write(source=None))
    with pytest.raises(FileNotFoundError, match=r"last.ckpt holds adapters only.*no checkpoint at gone.pth.*base="):
        load_checkpoint(distilled.write(source="gone.pth"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at elsewhere.pth"):
        load_checkpoint(distilled.write(), base="elsewhere.pth")


def test_a_base_that_is_not_needed_is_refused(distilled: Distilled) -> None:
    with pytest.raises(ValueError, match="holds a whole model"):
        load_checkpoint(distilled.target, base=distilled.target)


def test_only_students_with_adapters_can_leave_their_base_out(target: DiT, tmp_path: Path) -> None:
    for model, kind in ((target, "plain"), (flexify(target, [4]), "shared")):
        with pytest.raises(ValueError, match=f"this model is {kind} and has no adapters"):
            save_checkpoint(model, tmp_path / "a.safetensors", adapters_only=True)
    with pytest.raises(ValueError, match="no place for adapters"):
        save_checkpoint(target, tmp_path / "a.pt", layout_format="official", adapters_only=True)


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

    monkeypatch.setattr("flexidit.weight_files.save_file", broken)
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
