from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from flexidit import create_model, flexify, load_checkpoint, save_checkpoint
from flexidit.conditions import Captions
from flexidit.layouts import layout_of_official, wan
from flexidit.layouts.wan import (
    config_from_diffusers,
    config_from_official,
    config_to_diffusers,
    from_diffusers,
    from_official,
    to_diffusers,
    to_official,
)
from flexidit.models import Wan
from flexidit.recipes import plain_copy

Randomise = Callable[..., nn.Module]
T = torch.tensor([10.25, 800.0])
WEAK: list[int | str] = ["2x2x2", "1x4x4", "2x4x4"]
TINY: dict[str, Any] = {"input_size": (4, 8, 8), "in_channels": 4, "caption_channels": 40, "hidden_size": 48}


@pytest.fixture(scope="module")
def published(test_data: Path) -> dict[str, dict[str, Tensor]]:
    """Every name and shape of the public checkpoints, without their values."""
    entries = json.loads((test_data / "state_dict_keys.json").read_text())
    return {
        name: {key: torch.empty(shape, device="meta") for key, shape in entry["keys"].items()}
        for name, entry in entries.items()
        if "Wan" in name
    }


@pytest.fixture
def official(published: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return published["Wan2.1-T2V-1.3B (original)"]


def on_meta(name: str, **overrides: Any) -> Wan:
    with torch.device("meta"):
        model = create_model(name, **overrides)
    assert isinstance(model, Wan)
    return model


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def captions(num_tokens: int, width: int = 40) -> Captions:
    mask = torch.ones(2, num_tokens, dtype=torch.bool)
    mask[1, num_tokens // 2 + 1 :] = False
    return Captions(torch.randn(2, num_tokens, width), mask)


def as_wan_pads(y: Captions, length: int) -> Tensor:
    """What Wan's pipelines give the model: zeros where there is no token, up to one length."""
    y = y.padded(length)
    return torch.where(y.mask.unsqueeze(2), y.embeddings, 0)


def test_the_original_checkpoint_loads_strictly_and_goes_back(official: dict[str, Tensor]) -> None:
    model = on_meta("Wan-1.3B")
    assert len(official) == 825 and layout_of_official(official) is wan
    model.load_state_dict(from_official(official), strict=True, assign=True)
    assert shapes(to_official(model.state_dict())) == shapes(official)
    assert config_from_official(official) == model.config


def test_diffusers_names_and_shapes_are_ours_both_ways(published: dict[str, dict[str, Tensor]]) -> None:
    theirs, model = published["diffusers WanTransformer3DModel T2V-1.3B"], on_meta("Wan-1.3B")
    assert len(theirs) == 825
    model.load_state_dict(from_diffusers(theirs, depth=30), strict=True, assign=True)
    assert shapes(to_diffusers(model.state_dict(), depth=30)) == shapes(theirs)


@pytest.mark.parametrize("name", ["Wan-1.3B", "Wan-14B"])
def test_diffusers_class_has_the_names_shapes_and_config_of_ours(name: str) -> None:
    ours = on_meta(name, input_size=(20, 60, 104))
    with torch.device("meta"):
        peer = WanTransformer3DModel(**config_to_diffusers(ours.config))
    assert shapes(to_diffusers(ours.state_dict(), ours.config.depth)) == shapes(peer.state_dict())
    assert config_from_diffusers(peer.config) == on_meta(name).config
    assert config_from_official(to_official(ours.state_dict())) == on_meta(name).config
    told_less = {k: v for k, v in peer.config.items() if k not in (*wan._FIXED, "eps", "patch_size", "out_channels")}
    assert config_from_diffusers(told_less) == on_meta(name).config


def stock(heads: int = 3, head_size: int = 16) -> WanTransformer3DModel:
    peer = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_size, in_channels=4, out_channels=4, text_dim=40,
        ffn_dim=72, num_layers=2,
    ).eval()  # fmt: skip
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return peer


@pytest.mark.parametrize("head_size", [16, 20, 24])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_outputs_are_those_of_diffusers(
    head_size: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = stock(head_size=head_size).to(dtype)
    model = Wan(config_from_diffusers(peer.config)).eval().to(dtype)
    model.load_state_dict(from_diffusers(peer.state_dict(), 2))
    if dtype == torch.float64:  # diffusers computes its tables in float64, and rounds them and much else to float32
        _unrounded(peer)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for size, num_tokens in (((4, 8, 8), 5), ((1, 8, 6), 1), ((5, 6, 10), 12), ((7, 12, 8), 512)):
        x, y = torch.randn(2, 4, *size).to(dtype), captions(num_tokens)
        y.embeddings = y.embeddings.to(dtype)
        with torch.no_grad():
            theirs = peer(x, T, as_wan_pads(y, 512)).sample
            for condition in (y, model.prepare(y)):
                ours = model(x, T, condition, patch_size=2)
                torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def _unrounded(peer: WanTransformer3DModel) -> None:
    rope = peer.rope
    tables = []
    for size in (rope.t_dim, rope.h_dim, rope.w_dim):
        frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        tables.append(torch.outer(torch.arange(1024, dtype=torch.float64), frequencies).repeat_interleave(2, dim=1))
    angles = torch.cat(tables, dim=1)
    torch.testing.assert_close(rope.freqs_cos, angles.cos(), atol=1e-6, rtol=0, check_dtype=False)
    rope.freqs_cos, rope.freqs_sin = angles.cos(), angles.sin()


def test_diffusers_computes_what_ours_does(randomised: Randomise, tmp_path: Path) -> None:
    """The other direction, through files."""
    model = create_model("Wan-Tiny", **TINY, caption_length=512).eval()
    randomised(model)
    folder = save_checkpoint(model, tmp_path / "out", layout_format="diffusers")
    peer = WanTransformer3DModel.from_pretrained(folder)
    for size in ((4, 8, 8), (3, 6, 10)):
        x, y = torch.randn(2, 4, *size), captions(7)
        with torch.no_grad():
            theirs = peer(x, T, as_wan_pads(y, 512)).sample
            torch.testing.assert_close(theirs, model(x, T, y, patch_size=2), atol=1e-5, rtol=1e-5)
    loaded = load_checkpoint(folder, input_size=(4, 8, 8))
    assert loaded.config == model.config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("patch_size", WEAK)
def test_diffusers_computes_weak_patches_at_their_index(patch_size: str, randomised: Randomise) -> None:
    target = create_model("Wan-Tiny", **TINY)
    randomised(target)
    student = flexify(target, WEAK, recipe="lora", rank=2, positions="grid").eval()
    randomised(student, seed=1)
    weak = plain_copy(student, patch_size)
    peer = WanTransformer3DModel(**config_to_diffusers(weak.config))  # type: ignore[arg-type]
    peer.load_state_dict(to_diffusers(weak.state_dict(), 2))
    for size in ((4, 8, 8), (6, 4, 12)):
        x, y = torch.randn(2, 4, *size), captions(7)
        with torch.no_grad():
            theirs = peer.eval()(x, T, as_wan_pads(y, 16)).sample
            torch.testing.assert_close(theirs, student(x, T, y, patch_size=patch_size), atol=1e-5, rtol=1e-5)


def test_round_trips_are_exact(randomised: Randomise) -> None:
    model = create_model("Wan-Tiny", **TINY)
    randomised(model)
    state = model.state_dict()
    for there, back in ((to_official, from_official), (lambda s: to_diffusers(s, 2), lambda s: from_diffusers(s, 2))):
        again = back(there(state))
        assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)


def test_an_original_file_and_directory_load(randomised: Randomise, tmp_path: Path) -> None:
    """One safetensors file; and several behind an index, with the config.json that Wan's own code writes."""
    model = create_model("Wan-Tiny", **TINY, caption_length=512, norm_eps=1e-5)
    randomised(model)
    state = to_official(model.state_dict())
    save_file(state, tmp_path / "wan.safetensors")
    told: dict[str, Any] = {"num_heads": 4, "input_size": (4, 8, 8), "norm_eps": 1e-5}
    folder = tmp_path / "original"
    sharded(state, folder)
    values = {"_class_name": "WanModel", "dim": 48, "eps": 1e-5, "num_heads": 4, "text_len": 512, "model_type": "t2v"}
    (folder / "config.json").write_text(json.dumps(values))
    for loaded in (
        load_checkpoint(tmp_path / "wan.safetensors", **told),
        load_checkpoint(folder, input_size=(4, 8, 8)),
    ):
        assert loaded.config == model.config
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def sharded(state: dict[str, Tensor], folder: Path) -> None:
    """In three files and an index, and a stray file that the index does not list."""
    folder.mkdir()
    stem, names = "diffusion_pytorch_model", sorted(state)
    files = {name: f"{stem}-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    save_file({names[0]: state[names[0]] + 1}, folder / f"{stem}.fp16.safetensors")
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_a_sharded_directory_of_diffusers_loads(tmp_path: Path) -> None:
    peer = stock()
    sharded(dict(peer.state_dict()), tmp_path / "transformer")
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **peer.config}, default=list)
    )
    loaded = load_checkpoint(tmp_path)
    state = to_diffusers(loaded.state_dict(), 2)
    assert all(torch.equal(state[name], tensor) for name, tensor in peer.state_dict().items())
    (tmp_path / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00003.safetensors, which its index lists"):
        load_checkpoint(tmp_path)


def test_image_to_video_is_refused(official: dict[str, Tensor]) -> None:
    extra = torch.empty(1, device="meta")
    for name in ("img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight"):
        with pytest.raises(ValueError, match="image-to-video"):
            config_from_official({**official, name: extra})
    wide = {**official, "patch_embedding.weight": torch.empty(1536, 36, 1, 2, 2, device="meta")}
    with pytest.raises(ValueError, match="image-to-video"):
        config_from_official(wide)
    values = config_to_diffusers(on_meta("Wan-Tiny").config)
    for change in ({"image_dim": 1280}, {"added_kv_proj_dim": 64}, {"in_channels": 36}):
        with pytest.raises(ValueError, match="image-to-video"):
            config_from_diffusers({**values, **change})


def test_foreign_weights_and_arguments_are_named(official: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="give num_heads"):
        config_from_official(to_official(on_meta("Wan-Tiny").state_dict()))
    with pytest.raises(ValueError, match="no norm before cross-attention"):
        config_from_official({name: tensor for name, tensor in official.items() if "norm3" not in name})
    values = config_to_diffusers(on_meta("Wan-Tiny").config)
    for argument, value in (("qk_norm", "rms_norm"), ("cross_attn_norm", False), ("freq_dim", 128)):
        with pytest.raises(ValueError, match=argument):
            config_from_diffusers({**values, argument: value})


def test_what_diffusers_cannot_express_is_refused() -> None:
    student = flexify(on_meta("Wan-Tiny", **TINY), WEAK, recipe="lora", rank=2)
    with pytest.raises(ValueError, match="one patch size"):
        config_to_diffusers(student.config)
    for size in student.patch_sizes[1:]:
        with pytest.raises(ValueError, match="positions='grid'"):
            config_to_diffusers(student.config.plain(size))
    for size, clip in product(("2x2x2", "1x4x4"), ((21, 60, 104), (20, 90, 160), (21, 45, 80))):
        config = on_meta("Wan-Tiny", patch_size=size, input_size=clip).config
        divides = clip[0] % int(size[0]) == 0 and clip[1] % int(size[2]) == 0
        if divides:
            assert config_to_diffusers(config)["patch_size"] == [int(side) for side in size.split("x")]
            continue
        with pytest.raises(ValueError, match=f"{size} does not divide latent clips of {'x'.join(map(str, clip))}"):
            config_to_diffusers(config)
