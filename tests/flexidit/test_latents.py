import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from flexidit.images import find_images, read_pixels
from flexidit.latents import LatentCodec, PixelCodec, latent_size

PIXELS = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_kl_moments_are_those_of_diffusers_scaled(kl_vae):
    vae = AutoencoderKL.from_pretrained(kl_vae)
    with torch.no_grad():
        posterior = vae.encode(PIXELS).latent_dist
    moments = LatentCodec(kl_vae).encode_moments(PIXELS)
    torch.testing.assert_close(moments.mean, (posterior.mean - 0.25) * 0.5)
    torch.testing.assert_close(moments.std, posterior.std * 0.5)


def test_tiny_latents_are_taken_as_they_come(tiny_vae):
    vae = AutoencoderTiny.from_pretrained(tiny_vae)
    moments = LatentCodec(tiny_vae).encode_moments(PIXELS)
    with torch.no_grad():
        torch.testing.assert_close(moments.mean, vae.encode(PIXELS).latents)
    assert not moments.std.any()


@pytest.mark.parametrize("name", ["kl_vae", "tiny_vae"])
def test_decode_undoes_the_scaling(name, request):
    codec = LatentCodec(request.getfixturevalue(name))
    z = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    latents = (z - codec.layout.shift[0]) * codec.layout.scale[0]
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(latents), codec.vae.decode(z).sample.clamp(-1, 1))


def test_results_do_not_depend_on_the_batch_split(kl_vae):
    whole, split = (LatentCodec(kl_vae, batch_size=size).encode(PIXELS) for size in (5, 2))
    torch.testing.assert_close(whole, split)


def test_encode_resamples_with_the_given_noise(kl_vae):
    codec = LatentCodec(kl_vae)
    moments, noise = codec.encode_moments(PIXELS), torch.ones(5, 4, 4, 6)
    torch.testing.assert_close(codec.encode(PIXELS, noise), moments.mean + moments.std)
    torch.testing.assert_close(codec.encode(PIXELS), moments.mean)


def test_half_precision_is_close_and_returns_float32(tiny_vae):
    exact = LatentCodec(tiny_vae).encode(PIXELS)
    half = LatentCodec(tiny_vae, dtype="bfloat16").encode(PIXELS)
    assert half.dtype == torch.float32
    assert not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, atol=0.05, rtol=0.05)


def test_fingerprint_is_of_the_weights_and_not_of_the_file(kl_vae, tmp_path):
    vae = AutoencoderKL.from_pretrained(kl_vae)
    vae.save_pretrained(tmp_path / "pipeline" / "vae", max_shard_size="20KB")
    moved = LatentCodec(tmp_path / "pipeline").fingerprint
    assert moved == LatentCodec(kl_vae).fingerprint
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-3
    vae.save_pretrained(tmp_path / "other")
    assert LatentCodec(tmp_path / "other").fingerprint["weights_sha256"] != moved["weights_sha256"]
    assert (moved["class"], moved["scaling_factor"], moved["downscale"]) == ("AutoencoderKL", 0.5, 4)
    json.dumps(moved)


def test_a_codec_is_never_part_of_what_is_trained(tiny_vae):
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codec = LatentCodec(tiny_vae)
            self.codec.encode(PIXELS)

    assert not list(Trained().parameters())
    assert not Trained().state_dict()
    assert not any(parameter.requires_grad for parameter in Trained().codec.vae.parameters())


def test_nothing_is_read_before_it_is_needed():
    assert LatentCodec("/nowhere/vae").source == "/nowhere/vae"


def test_wrong_shapes_are_refused(tiny_vae):
    codec = LatentCodec(tiny_vae)
    for shape in ((1, 1, 16, 16), (1, 3, 15, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match=r"encodes pixels of shape \(N, 3, H, W\) with H and W divisible by 4"):
            codec.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"decodes latents of shape \(N, 4, h, w\)"):
        codec.decode(torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"batch_size": 0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="codec's"):
        LatentCodec("owner/name", **options)


def test_latent_size(tiny_vae):
    assert latent_size(LatentCodec(tiny_vae), 32) == (4, 8, 8)
    assert latent_size(PixelCodec(1), 8) == (1, 8, 8)
    assert latent_size(LatentCodec(tiny_vae), (32, 16)) == (4, 8, 4)
    with pytest.raises(ValueError, match="30 is not divisible by the VAE's 4: try 28"):
        latent_size(LatentCodec(tiny_vae), 30)
    with pytest.raises(ValueError, match="32x30 is not divisible by the VAE's 4: try 32x28"):
        latent_size(LatentCodec(tiny_vae), (32, 30))


def test_pixel_codec_is_the_identity():
    codec = PixelCodec()
    assert codec.decode(codec.encode(PIXELS)).equal(PIXELS)
    assert codec.encode_moments(PIXELS).sample(torch.ones_like(PIXELS)).equal(PIXELS)
    assert codec.decode(3 * PIXELS).abs().max() == 1


def test_taesd_rebuilds_real_images_and_is_scaled_already(test_data):
    index = find_images(test_data / "imagenet_samples")
    pixels = torch.stack([read_pixels(index.path(number), 128) for number in (0, 4)])
    codec = LatentCodec(test_data / "taesd")
    assert (codec.layout.scale, codec.downscale, codec.latent_channels) == ((1.0,), 8, 4)
    latents = codec.encode(pixels)
    assert 0.5 < latents.std() < 1.5
    psnr = -10 * ((codec.decode(latents) - pixels) / 2).square().mean().log10()
    assert psnr > 20
