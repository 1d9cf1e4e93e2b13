"""Fixtures and switches for the whole suite."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadgroup`` all tests of several processes run on one worker, one after another, and start first.

    Two of them at once would wait for one another's processes, and what a module shares would run on both workers.
    (xdist 3.8 writes the mark ``xdist_group`` into an attribute that pytest 9.2 does not read any more.)
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class DistributedTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "distributed" if "distributed" in nodeid.partition("::")[0] else nodeid

    return DistributedTogether(config, log)


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


class _Hostile:
    """Unpickled with all that pickle can do, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture(scope="session")
def hostile() -> Callable[..., Path]:
    """Write a checkpoint that makes the file ``was_run`` beside it if its code is run: ``(path, is_zip=True)``."""

    def write(path: Path, is_zip: bool = True) -> Path:
        values = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "global_step": 1, "epoch": 0}
        values["hook"] = _Hostile(path.parent / "was_run")
        if is_zip:
            torch.save(values, path)
        else:
            path.write_bytes(pickle.dumps(values))
        return path

    return write


@pytest.fixture(scope="session")
def flip_a_bit() -> Callable[[Path], Path]:
    """Change one bit of the largest tensor of a checkpoint, in place: ``(path)``."""

    def flip(path: Path) -> Path:
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
        content = bytearray(path.read_bytes())
        position = content.index(largest.filename.encode(), largest.header_offset) + 64 + largest.file_size // 2
        content[position] ^= 1
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(content)
        os.utime(path, ns=times)  # a disk that forgets does not say when
        return path

    return flip


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


@pytest.fixture(scope="session")
def write_clip() -> Callable[..., Path]:
    """Write a smooth random video: ``(path, num_frames, seed=..., times=..., audio=...)``, 32x40 at 8 fps."""
    import av

    def write(path: Path, num_frames: int = 12, seed: int = 0, times: list[int] | None = None, audio: bool = False):
        rng = np.random.default_rng(seed)
        corners = rng.integers(0, 256, (2, 4, 5, 3)).astype(float)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 40, 32, "yuv420p"
            stream.codec_context.thread_count = 1
            if audio:
                _write_silence(container)
            for number, time in enumerate(times or range(num_frames)):
                mixed = corners[0] + (corners[1] - corners[0]) * number / num_frames
                frame = av.VideoFrame.from_ndarray(mixed.repeat(8, 0).repeat(8, 1).astype(np.uint8))
                frame.pts = time
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


def _write_silence(container: Any) -> None:
    import av

    stream = container.add_stream("aac", rate=16000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


@pytest.fixture
def clip_folder(tmp_path: Path, write_clip: Callable[..., Path]) -> Path:
    """Six clips of 12 or more frames at 8 fps, with two captions each beside them."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(6):
        write_clip(folder / f"{number}.mp4", 12 + number, seed=number)
        (folder / f"{number}.txt").write_text(f"clip {number} line 0\nclip {number} line 1")
    return folder


CLIP_KINDS = {  # name with its kind -> what is said of it where 9 frames at 8 fps are asked for; None: it is fine
    "short.mp4": "too short",
    "corrupt_tail.mkv": "cut off|damaged",
    "corrupt_end.mkv": None,
    "audio_only.mp4": "no video stream",
    "empty.mp4": "zero bytes",
    "text.mp4": "not a video",
    "rotated.mp4": None,
    "variable_rate.mkv": None,
    "with_audio.mp4": None,
}


@pytest.fixture(scope="session")
def clip_kinds(tmp_path_factory: pytest.TempPathFactory, write_clip: Callable[..., Path]) -> dict[str, bytes]:
    """The files of ``CLIP_KINDS``."""
    import av

    folder = tmp_path_factory.mktemp("kinds")
    whole = write_clip(folder / "whole.mkv", 40).read_bytes()
    with av.open(str(folder / "audio_only.mp4"), "w") as container:
        _write_silence(container)
    irregular = sorted(np.random.default_rng(0).choice(40, 16, replace=False).tolist())
    return {
        "short.mp4": write_clip(folder / "short.mp4", 8).read_bytes(),
        "corrupt_tail.mkv": whole[: len(whole) // 6],
        "corrupt_end.mkv": whole[: len(whole) * 3 // 4],
        "audio_only.mp4": (folder / "audio_only.mp4").read_bytes(),
        "empty.mp4": b"",
        "text.mp4": b"no video at all\n" * 100,
        "rotated.mp4": _rotated(write_clip(folder / "rotated.mp4", 12).read_bytes()),
        "variable_rate.mkv": write_clip(folder / "variable_rate.mkv", times=irregular).read_bytes(),
        "with_audio.mp4": write_clip(folder / "with_audio.mp4", 12, audio=True).read_bytes(),
    }


def _rotated(video: bytes) -> bytes:
    """An mp4 whose track header says that it was filmed upright on its side."""
    start = video.index(b"tkhd") + 44
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return video[:start] + matrix + video[start + len(matrix) :]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "clip_kind" in metafunc.fixturenames:
        metafunc.parametrize("clip_kind", CLIP_KINDS.items(), ids=list(CLIP_KINDS))
