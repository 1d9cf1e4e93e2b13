from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, WanTransformer3DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexidit import create_model, flexify, load_checkpoint, save_checkpoint
from flexidit.checkpoint import read_any
from flexidit.conditions import Captions
from flexidit.export import EMBEDDINGS, Adapters, adapters_of, read_peft, save_peft
from flexidit.models import DiT, FlexiTransformer, TextDiT, Wan

Randomise = Callable[..., nn.Module]
T = torch.tensor([10, 800])


@pytest.fixture
def text_student(randomised: Randomise) -> TextDiT:
    target = create_model(
        "TextDiT-Tiny/2", input_size=8, hidden_size=48, num_heads=4, caption_channels=40, position_scale=2.0
    )
    randomised(target)
    student = flexify(target, [4, 8], recipe="lora", rank=2, alpha=3.0, positions="corners")
    assert isinstance(randomised(student, seed=1), TextDiT)
    return student.eval()  # type: ignore[return-value]


@pytest.fixture
def class_student(randomised: Randomise) -> DiT:
    target = create_model("DiT-Tiny/2", input_size=8, num_classes=10, frequency_shift=1, mlp_norm_eps=1e-5)
    randomised(target)
    student = flexify(target, [4], recipe="lora", rank=2, positions="grid")
    assert isinstance(randomised(student, seed=1), DiT)
    return student.eval()  # type: ignore[return-value]


def exported(student: FlexiTransformer, folder: Path) -> Path:
    return save_peft(adapters_of(student.config, student.state_dict(), "base"), folder / "out")


def target_folder(student: FlexiTransformer, folder: Path) -> Path:
    """The target as stock diffusers has it."""
    from flexidit.recipes import plain_copy

    return save_checkpoint(plain_copy(student, 2), folder / "target", layout_format="diffusers")


@pytest.fixture
def wan_student(randomised: Randomise) -> Wan:
    target = create_model("Wan-Tiny", input_size=(4, 8, 8), in_channels=4, hidden_size=48, caption_channels=40)
    randomised(target)
    student = flexify(target, ["2x2x2", "1x4x4"], recipe="lora", rank=2, alpha=3.0, positions="grid")
    assert isinstance(randomised(student, seed=1), Wan)
    return student.eval()  # type: ignore[return-value]


@pytest.mark.parametrize("family", ["text_student", "class_student", "wan_student"])
def test_what_was_written_comes_back_bit_for_bit(family: str, request: Any, tmp_path: Path) -> None:
    student = request.getfixturevalue(family)
    target = save_checkpoint(_plain(student), tmp_path / "target.safetensors")
    loaded = load_checkpoint(exported(student, tmp_path), base=target)
    assert loaded.config == student.config
    state = student.state_dict()
    assert set(state) == set(loaded.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    x, y = torch.randn(2, 4, *student.input_size), condition(student)
    for size in student.patch_sizes:
        assert torch.equal(loaded(x, T, y, patch_size=size), student(x, T, y, patch_size=size))


def _plain(student: FlexiTransformer) -> FlexiTransformer:
    from flexidit.recipes import plain_copy

    return plain_copy(student, student.base_patch_size)


def condition(student: FlexiTransformer) -> Any:
    if isinstance(student, DiT):
        return torch.tensor([1, 9])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return Captions(torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)), mask)


def as_described(peer: Any, described: dict[str, Any], folder: Path, config: dict[str, Any]) -> Any:
    """Stock diffusers' model of a weak size, its ends replaced as ``flexidit.json`` says."""
    ends = load_file(folder / "embeddings.safetensors")
    side = described["patch_size"][1]
    scale = described["interpolation_scale"]
    options = {} if scale is None else {"interpolation_scale": scale}
    weak = type(peer)(**{**config, "patch_size": side, **options})
    state = peer.state_dict()
    state |= {name: sum(ends[part] for part in parts) for name, parts in described["tensors"].items()}
    weak.load_state_dict(state)
    return weak.eval()


@pytest.mark.parametrize("size", ["1x4x4", "1x8x8"])
def test_peft_and_diffusers_alone_compute_the_weak_size(text_student: TextDiT, size: str, tmp_path: Path) -> None:
    out = exported(text_student, tmp_path)
    peer = PixArtTransformer2DModel.from_pretrained(target_folder(text_student, tmp_path))
    described = json.loads((out / "flexidit.json").read_text())["sizes"][size]
    weak = as_described(peer, described, out, dict(peer.config))
    adapted = PeftModel.from_pretrained(weak, out / size)
    y = condition(text_student)
    for shape in ((8, 8), (16, 8)):
        x = torch.randn(2, 4, *shape)
        with torch.no_grad():
            theirs = adapted(x, y.embeddings, T, encoder_attention_mask=y.mask.float()).sample
            ours = text_student(x, T, y, patch_size=size)
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_class_conditional_adapters_load_too(class_student: DiT, tmp_path: Path) -> None:
    out = exported(class_student, tmp_path)
    peer = DiTTransformer2DModel.from_pretrained(target_folder(class_student, tmp_path))
    described = json.loads((out / "flexidit.json").read_text())["sizes"]["1x4x4"]
    adapted = PeftModel.from_pretrained(as_described(peer, described, out, dict(peer.config)), out / "1x4x4")
    x, y = torch.randn(2, 4, 8, 8), condition(class_student)
    with torch.no_grad():
        theirs, ours = adapted(x, T, y).sample, class_student(x, T, y, patch_size=4)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", ["2x2x2", "1x4x4"])
def test_peft_and_diffusers_alone_compute_the_weak_size_of_a_wan(wan_student: Wan, size: str, tmp_path: Path) -> None:
    out = exported(wan_student, tmp_path)
    peer = WanTransformer3DModel.from_pretrained(target_folder(wan_student, tmp_path))
    described, ends = json.loads((out / "flexidit.json").read_text())["sizes"][size], load_file(out / EMBEDDINGS)
    weak = WanTransformer3DModel(**{**peer.config, "patch_size": described["patch_size"]})
    own = {name: sum(ends[part] for part in parts) for name, parts in described["tensors"].items()}
    weak.load_state_dict({**peer.state_dict(), **own})  # type: ignore[arg-type]
    adapted = PeftModel.from_pretrained(weak.eval(), out / size)  # type: ignore[arg-type]
    x, y = torch.randn(2, 4, 4, 8, 12), condition(wan_student)
    shown = torch.where(y.mask.unsqueeze(2), y.embeddings, 0)
    padded = nn.functional.pad(shown, (0, 0, 0, wan_student.config.caption_length - 5))
    with torch.no_grad():
        theirs, ours = adapted(x, T, padded).sample, wan_student(x, T, y, patch_size=size)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_peft_loads_every_factor_and_no_other(text_student: TextDiT, tmp_path: Path, recwarn: Any) -> None:
    out = exported(text_student, tmp_path)
    peer = PixArtTransformer2DModel.from_pretrained(target_folder(text_student, tmp_path))
    adapted = PeftModel.from_pretrained(peer, out / "1x4x4")
    assert not [str(w.message) for w in recwarn if "key" in str(w.message).lower()]  # peft warns of missing keys
    saved = load_file(out / "1x4x4" / "adapter_model.safetensors")
    loaded = {name.replace(".default.", "."): p for name, p in adapted.named_parameters() if ".lora_" in name}
    assert set(loaded) == set(saved)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    adapted.save_pretrained(tmp_path / "theirs")
    again = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert set(again) == set(saved)


def test_the_adapters_are_small_and_know_their_base(text_student: TextDiT, tmp_path: Path) -> None:
    out = exported(text_student, tmp_path)
    found = read_any(out)
    assert isinstance(found, Adapters) and found.base.source == "base"
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    adapters = [f"{size}/{name}" for size in ("1x4x4", "1x8x8") for name in ("config.json", "model.safetensors")]
    assert files == sorted(
        [*(a.replace("/", "/adapter_") for a in adapters), "embeddings.safetensors", "flexidit.json"]
    )


def test_half_precision_halves_the_files(text_student: TextDiT, tmp_path: Path) -> None:
    added = adapters_of(text_student.config, text_student.state_dict(), "base")
    out = save_peft(added.to(torch.bfloat16), tmp_path / "out")
    tensors = read_peft(out).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    target = save_checkpoint(_plain(text_student), tmp_path / "target.safetensors")
    loaded = load_checkpoint(out, target).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}  # the base is not rounded to fit
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items())


def spoil(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_damage_is_named(text_student: TextDiT, tmp_path: Path) -> None:
    out = exported(text_student, tmp_path)
    key = "base_model.model.transformer_blocks.1.attn1.to_k.lora_{}.weight"
    weights = out / "1x8x8" / "adapter_model.safetensors"
    spoil(weights, lambda tensors: tensors[key.format("A")].add_(1))
    with pytest.raises(ValueError, match=r"1x8x8 has unlike first factors"):
        read_peft(out)
    spoil(weights, lambda tensors: tensors.pop(key.format("B")))
    with pytest.raises(ValueError, match=r"1x8x8 .*attn1\.to_k\.lora_B"):
        read_peft(out)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"1x8x8.adapter_model.safetensors is missing"):
        read_peft(out)
    for text, sentence in (("{", "damaged"), ("[]", "holds a list"), ("{}", "does not describe adapters")):
        (out / "flexidit.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_checkpoint(out)


def test_a_version_of_tomorrow_is_refused(text_student: TextDiT, tmp_path: Path) -> None:
    out = exported(text_student, tmp_path)
    values = json.loads((out / "flexidit.json").read_text())
    (out / "flexidit.json").write_text(json.dumps({**values, "version": 9}))
    with pytest.raises(ValueError, match="version 9, known is 1"):
        load_checkpoint(out)


def test_an_export_that_was_cut_off_is_none(
    text_student: TextDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = exported(text_student, tmp_path)

    def full_disk(*args: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("flexidit.export.save_json", full_disk)
        with pytest.raises(OSError, match="No space"):
            exported(text_student, tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_checkpoint(out)


def test_one_adapter_is_not_the_whole(text_student: TextDiT, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the folder above"):
        load_checkpoint(exported(text_student, tmp_path) / "1x4x4")


def test_models_that_diffusers_has_no_class_for_are_refused(tmp_path: Path) -> None:
    emu = create_model("TextDiT-Tiny/2", input_size=8, qk_norm=True, position_table="learned")
    with pytest.raises(ValueError, match="normalises queries"):
        exported(flexify(emu, [4], recipe="lora", rank=2), tmp_path)
    assert not list(tmp_path.iterdir())
    for student, kind in ((emu, "plain"), (flexify(emu, [4]), "shared")):
        with pytest.raises(ValueError, match=f"this model is {kind}"):
            exported(student, tmp_path)


def test_the_writer_does_not_need_peft(text_student: TextDiT, tmp_path: Path, monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    assert exported(text_student, tmp_path).is_dir()
