"""Tiny images and VAEs for the tests of data."""

from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve smooth JPEGs of unequal sizes, four in each of three class folders."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "images" / f"n0000000{number // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        small.resize((40 + number, 36), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.jpg", quality=95)
    return tmp_path / "images"


@pytest.fixture
def kl_vae(tmp_path: Path) -> Path:
    """Folder of a random AutoencoderKL: 3 -> 4 channels, downscale 4, scaling factor 0.5."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    vae.save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


@pytest.fixture
def tiny_vae(tmp_path: Path) -> Path:
    """Folder of a random AutoencoderTiny: 3 -> 4 channels, downscale 4."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    vae.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"
