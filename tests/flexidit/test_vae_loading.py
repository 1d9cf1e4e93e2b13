import json

import pytest
from diffusers import AutoencoderKL

from flexidit.latents import LatentCodec


@pytest.mark.parametrize("source", ["/nowhere/vae", "./nowhere", "nowhere"])
def test_absent_folders_are_refused(source):
    with pytest.raises(FileNotFoundError, match="no VAE at"):
        _ = LatentCodec(source).vae


def test_unreachable_hub_ids_are_refused_in_one_sentence(monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr(AutoencoderKL, "load_config", fail)
    with pytest.raises(ValueError, match=r"^owner/name is no local folder .* couldn't connect to the hub\)[^\n]*$"):
        _ = LatentCodec("owner/name").vae


def test_other_models_are_refused(tiny_vae):
    config = json.loads((tiny_vae / "config.json").read_text())
    (tiny_vae / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="is a UNet2DModel, not a VAE"):
        _ = LatentCodec(tiny_vae).vae


def test_cut_weights_are_refused(tiny_vae):
    weights = tiny_vae / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be read"):
        _ = LatentCodec(tiny_vae).vae


def test_missing_weights_are_refused_and_not_random(tiny_vae):
    from safetensors.torch import load_file, save_file

    weights = tiny_vae / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 tensors"):
        _ = LatentCodec(tiny_vae).vae
