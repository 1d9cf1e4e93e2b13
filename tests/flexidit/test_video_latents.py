"""Clips through the codec of ``flexidit/latents.py``: VAEs of clips, and VAEs of images frame by frame."""

import json

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

from flexidit.latents import LatentCodec, PixelCodec, check_frames, latent_size, pixel_size

CLASSES = {"wan_vae": AutoencoderKLWan, "cogvideox_vae": AutoencoderKLCogVideoX}
VIDEO_VAES = list(CLASSES)
CLIPS = torch.rand(3, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
MEAN, STD = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in ([0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 0.25]))


def encoded(folder, name):
    with torch.no_grad():
        return CLASSES[name].from_pretrained(folder).encode(CLIPS).latent_dist


def test_wan_latents_are_those_of_diffusers_normalised_by_channel(wan_vae):
    posterior, moments = encoded(wan_vae, "wan_vae"), LatentCodec(wan_vae).encode_moments(CLIPS)
    torch.testing.assert_close(moments.mean, (posterior.mean - MEAN) / STD)
    torch.testing.assert_close(moments.std, posterior.std / STD)


def test_cogvideox_latents_are_those_of_diffusers_scaled(cogvideox_vae):
    posterior, moments = encoded(cogvideox_vae, "cogvideox_vae"), LatentCodec(cogvideox_vae).encode_moments(CLIPS)
    torch.testing.assert_close(moments.mean, posterior.mean * 0.7)
    torch.testing.assert_close(moments.std, posterior.std * 0.7)


def wan_pipeline(codec):
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=8,
        num_layers=1,
    )  # fmt: skip
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return WanPipeline(None, None, codec.vae, solver, transformer), torch.randn(1, 4, 3, 4, 8)


def cogvideox_pipeline(codec):
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=1, sample_width=8, sample_height=4, sample_frames=9, max_text_seq_length=3,
    )  # fmt: skip
    pipeline = CogVideoXPipeline(None, None, codec.vae, transformer, CogVideoXDDIMScheduler())
    return pipeline, torch.randn(1, 3, 4, 4, 8)


@pytest.mark.parametrize("name, make", [("wan_vae", wan_pipeline), ("cogvideox_vae", cogvideox_pipeline)])
def test_a_stock_pipeline_decodes_the_same_latents_to_the_same_clip(name, make, request):
    codec = LatentCodec(request.getfixturevalue(name))
    pipeline, noise = make(codec)
    pipeline.set_progress_bar_config(disable=True)
    told = {"prompt_embeds": torch.randn(1, 3, 8), "guidance_scale": 1.0, "num_inference_steps": 1, "num_frames": 9}

    def run(output_type):
        return pipeline(**told, height=16, width=32, latents=noise.clone(), output_type=output_type).frames

    latents = run("latent")
    if name == "cogvideox_vae":
        latents = latents.transpose(1, 2)  # its pipeline has frames before channels
    clips = torch.as_tensor(run("pt")).transpose(1, 2)
    torch.testing.assert_close(codec.decode(latents) / 2 + 0.5, clips)


@pytest.mark.parametrize("name", VIDEO_VAES)
def test_sizes_are_those_of_what_comes_out(name, request):
    codec = LatentCodec(request.getfixturevalue(name))
    for num_frames in (1, 9, 17):
        pixels = torch.zeros(1, 3, num_frames, 16, 24)
        latents = codec.encode(pixels)
        assert latents.shape[1:] == latent_size(codec, (16, 24), num_frames)
        assert pixel_size(codec, latents.shape[2:]) == codec.decode(latents).shape[2:] == pixels.shape[2:]
    assert (codec.downscale, codec.temporal_downscale, codec.latent_channels) == (4, 4, 4)
    assert codec.is_video
    assert not codec.is_deterministic


@pytest.mark.parametrize("name", VIDEO_VAES)
def test_results_do_not_depend_on_the_batch_split(name, request):
    whole, split = (LatentCodec(request.getfixturevalue(name), batch_size=size) for size in (27, 1))
    latents = whole.encode(CLIPS)
    torch.testing.assert_close(latents, split.encode(CLIPS))
    torch.testing.assert_close(whole.decode(latents), split.decode(latents))


def test_batches_are_counted_in_frames_and_hold_a_clip_at_least(wan_vae):
    sizes = []
    for batch_size in (1, 18, 100):
        codec = LatentCodec(wan_vae, batch_size=batch_size)
        encode = codec.vae.encode
        codec.vae.encode = lambda x, encode=encode: sizes.append(len(x)) or encode(x)
        codec.encode(CLIPS)
    assert sizes == [1, 1, 1, 2, 1, 3]


@pytest.mark.parametrize("name", ["kl_vae", "tiny_vae"])
def test_a_vae_of_images_takes_the_frames_one_by_one(name, request):
    codec = LatentCodec(request.getfixturevalue(name))
    moments = codec.encode_moments(CLIPS)
    for frame in (0, 8):
        alone = codec.encode_moments(CLIPS[:, :, frame])
        torch.testing.assert_close(moments.mean[:, :, frame], alone.mean)
        torch.testing.assert_close(moments.std[:, :, frame], alone.std)
        torch.testing.assert_close(codec.decode(moments.mean)[:, :, frame], codec.decode(alone.mean))
    assert moments.mean.shape[1:] == latent_size(codec, (16, 24), 9) == (4, 9, 4, 6)
    assert pixel_size(codec, (9, 4, 6)) == (9, 16, 24)


def test_pixels_of_clips_pass():
    codec = PixelCodec()
    assert codec.decode(codec.encode(CLIPS)).equal(CLIPS)
    assert latent_size(codec, (16, 24), 9) == (3, 9, 16, 24)
    assert pixel_size(codec, (16, 24)) == (16, 24)


def test_decoded_clips_stay_in_range(cogvideox_vae):
    assert LatentCodec(cogvideox_vae).decode(100 * torch.randn(1, 4, 3, 4, 6)).abs().max() <= 1


@pytest.mark.parametrize(
    "name, num_frames, nearest",
    [("wan_vae", 8, 9), ("wan_vae", 10, 9), ("wan_vae", 0, 1), ("cogvideox_vae", 5, 1), ("cogvideox_vae", 14, 17)],
)
def test_lengths_that_would_not_come_back_are_refused_with_the_nearest(name, num_frames, nearest, request):
    codec = LatentCodec(request.getfixturevalue(name))
    with pytest.raises(ValueError, match=rf"^clips of {num_frames} frames do not fit .*: try {nearest}$"):
        latent_size(codec, 16, num_frames)
    with pytest.raises(ValueError, match=f"try {nearest}"):
        codec.encode(torch.zeros(1, 3, num_frames, 16, 16))
    check_frames(codec, nearest)


def test_latents_of_lengths_that_would_not_come_back_are_refused(cogvideox_vae):
    with pytest.raises(ValueError, match="clips of 5 frames do not fit"):
        LatentCodec(cogvideox_vae).decode(torch.zeros(1, 4, 2, 4, 4))


def test_images_and_wrong_shapes_are_refused(wan_vae, tiny_vae):
    codec = LatentCodec(wan_vae)
    with pytest.raises(ValueError, match="for clips and not for images"):
        latent_size(codec, 16)
    for shape in ((1, 3, 16, 16), (1, 1, 9, 16, 16), (1, 3, 9, 18, 16)):
        with pytest.raises(ValueError, match=r"encodes pixels of shape \(N, 3, F, H, W\) with H and W divisible by 4"):
            codec.encode(torch.zeros(shape))
    for shape in ((1, 4, 4, 4), (1, 3, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"decodes latents of shape \(N, 4, f, h, w\)"):
            codec.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"encodes pixels of shape \(N, 3, H, W\)"):
        LatentCodec(tiny_vae).encode(torch.zeros(1, 3, 9, 18, 16))


def test_fingerprints_tell_statistics_and_weights_apart(wan_vae, cogvideox_vae, tmp_path):
    fingerprint = LatentCodec(wan_vae).fingerprint
    assert fingerprint["class"] == "AutoencoderKLWan"
    assert (fingerprint["latents_std"], fingerprint["temporal_downscale"]) == ([1.0, 2.0, 0.5, 0.25], 4)
    assert LatentCodec(cogvideox_vae).fingerprint["scaling_factor"] == 0.7
    json.dumps(fingerprint)
    vae = AutoencoderKLWan.from_pretrained(wan_vae)
    vae.register_to_config(latents_mean=[0.0] * 4)
    vae.save_pretrained(tmp_path)
    other = LatentCodec(tmp_path).fingerprint
    assert {name for name in other if other[name] != fingerprint[name]} == {"latents_mean"}


@pytest.mark.parametrize("name", VIDEO_VAES)
def test_tiles_are_those_of_the_class(name, request):
    folder = request.getfixturevalue(name)
    codec, tiled = LatentCodec(folder), LatentCodec(folder, tiling=True)
    assert tiled.vae.use_tiling
    pixels = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    if name == "wan_vae":  # tiles of 16 pixels; CogVideoX makes them half of its configured size
        tiled.vae.enable_tiling(16, 16, 12, 12)
    latents = tiled.encode(pixels)
    assert latents.shape == codec.encode(pixels).shape
    assert tiled.decode(latents).shape == pixels.shape
    assert not tiled.decode(latents).equal(codec.decode(latents))
