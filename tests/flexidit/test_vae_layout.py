import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

from flexidit.latents import LatentCodec, latent_size
from flexidit.vae_layout import read_layout


def test_stages_decide_the_downscale_and_not_the_note_beside_them(tmp_path):
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, scale_factor_spatial=8,
    )  # fmt: skip
    vae.save_pretrained(tmp_path)
    codec, pixels = LatentCodec(tmp_path), torch.zeros(1, 3, 5, 16, 24)
    assert codec.encode(pixels).shape[1:] == latent_size(codec, (16, 24), 5) == (4, 3, 8, 12)
    assert codec.decode(codec.encode(pixels)).shape == pixels.shape


def test_pixel_patches_of_wan_2_2_count_for_the_downscale(tmp_path):
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, patch_size=2, in_channels=12, out_channels=12, is_residual=True,
    )  # fmt: skip
    vae.save_pretrained(tmp_path)
    codec, pixels = LatentCodec(tmp_path), torch.zeros(1, 3, 5, 16, 24)
    assert codec.encode(pixels).shape[1:] == latent_size(codec, (16, 24), 5) == (4, 3, 4, 6)
    assert codec.decode(codec.encode(pixels)).shape == pixels.shape


def published_layout(vae_class):
    with torch.device("meta"):
        return read_layout(vae_class.__name__, vae_class().config)


def test_the_published_vaes_have_their_published_sizes():
    wan, cogvideox = published_layout(AutoencoderKLWan), published_layout(AutoencoderKLCogVideoX)
    for layout in (wan, cogvideox):
        assert (layout.pixel_channels, layout.latent_channels) == (3, 16)
        assert (layout.downscale, layout.temporal_downscale) == (8, 4)
    assert (wan.frame_step, cogvideox.frame_step) == (4, 8)  # 81 and 49 frames
    assert (len(wan.shift), cogvideox.scale) == (16, (1.15258426,))


def test_real_normalised_latents_of_wan_have_the_scale_that_the_layout_gives(test_data):
    latents = torch.load(test_data / "videos" / "test_latents_wan.pth", map_location="cpu", weights_only=True).float()
    std = latents.std((0, 2, 3, 4))
    raw = 1 / torch.tensor(published_layout(AutoencoderKLWan).scale)
    assert (std.log().abs() < (std / raw).log().abs()).float().mean() > 0.7  # nearer to 1 than to Wan's own
