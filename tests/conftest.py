"""Fixtures and switches for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take more than half a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes more than half a minute; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with setup.cfg."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real images, latents and weights that are not part of the project."""
    for folder in (os.environ.get("FLEXIDIT_TEST_DATA"), REPOSITORY.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("needs real data: set FLEXIDIT_TEST_DATA to a folder that has it")


@pytest.fixture(scope="session")
def randomised() -> Callable[..., nn.Module]:
    """Fill every trainable tensor of a model: fresh DiTs output zero, which would hide most differences."""

    def fill(model: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=std, generator=generator)
        return model

    return fill


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


@pytest.fixture(scope="session")
def wan_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random AutoencoderKLWan: 3 -> 4 channels, downscale 4 in space and in time; read only."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 0.25],
        scale_factor_spatial=4,
    )
    folder = tmp_path_factory.mktemp("wan")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cogvideox_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random AutoencoderKLCogVideoX: 3 -> 4 channels, downscale 4 in space and in time; read only."""
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
        sample_height=48,
        sample_width=40,
    )
    folder = tmp_path_factory.mktemp("cogvideox")
    vae.save_pretrained(folder)
    return folder
