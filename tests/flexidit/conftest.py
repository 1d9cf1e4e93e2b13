"""Fixtures of the package's own tests."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from flexidit.metrics.curve_points import CurvePoint


@pytest.fixture(scope="session")
def save_word_tokenizer() -> Callable[..., None]:
    """Write a tokenizer of whole words, with T5's special tokens, to a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    def save(folder: Path, words: str = "a dog , running man on red bicycle") -> None:
        vocabulary = ["<pad>", "</s>", "<unk>", *words.split()]
        tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory, save_word_tokenizer: Callable[..., None]) -> Path:
    """Folder of a random T5 encoder of width 32 and a tokenizer of a few words, as in a pipeline; read only."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    save_word_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def points() -> list[CurvePoint]:
    """Measured points of two series, two of them with different seeds."""
    first = CurvePoint(
        series="weak first", budget=1.0, relative_flops=1.0, flops_per_image=1, frechet=2.0, accuracy=None,
        seconds_per_image=0.1, schedule="1x2x2:5", num_sampling_steps=5, num_samples=500, evaluator="some classifier",
        fingerprint="f", reference="digits (1437 samples)", model="m", codec="PixelCodec", solver="ddpm", cfg_scale=1.5,
        guidance_channels=None, precision="float32", seed=0, batch_size=8, device="cpu",
    )  # fmt: skip
    return [
        first,
        replace(first, seed=1, frechet=4.0),
        replace(first, relative_flops=0.4, frechet=5.0),
        replace(first, series="weak last", relative_flops=0.7, frechet=9.0),
    ]


@pytest.fixture
def swept(points: list[CurvePoint]) -> list[CurvePoint]:
    """Two budgets at three guidance scales, of a model of captions; the middle scale is best, but for one seed."""
    values = {1.0: (3.0, 0.7), 2.0: (2.0, 0.8), 4.0: (4.0, 0.9)}
    first = replace(points[0], conditions="some prompts", judges="some judge")
    measured = [
        replace(first, budget=budget, relative_flops=budget, cfg_scale=scale, frechet=frechet / budget, agreement=share)
        for budget in (1.0, 0.5)
        for scale, (frechet, share) in values.items()
    ]
    return [*measured, replace(measured[0], seed=1, frechet=1.5), replace(measured[1], seed=1, frechet=2.0)]


@pytest.fixture(scope="session")
def umt5(tmp_path_factory: pytest.TempPathFactory, save_word_tokenizer: Callable[..., None]) -> Path:
    """As ``t5``, of a UMT5, which Wan reads."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan_pipeline")
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    save_word_tokenizer(folder / "tokenizer", "a A dog , Running man on red bicycle &")
    return folder


@pytest.fixture(scope="session")
def wan_pipeline(tmp_path_factory: pytest.TempPathFactory, umt5: Path) -> Path:
    """Folder of a tiny random WanPipeline, without transformers; read only."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(umt5 / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(umt5 / "text_encoder")
    flow: dict[str, object] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    folder = tmp_path_factory.mktemp("stock")
    WanPipeline(tokenizer, encoder, vae, UniPCMultistepScheduler(**flow)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def noise_frames() -> np.ndarray:
    """Twenty different frames of noise: (20, 32, 48, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """Write frames, (F, H, W, 3) uint8: ``(path, frames, codec, pix_fmt, rate=, times=, aspect=, **codec options)``.

    Without loss by default. ``times`` are those of the frames in units of 1 / rate.
    """
    import av

    def write(
        path: Path, frames: np.ndarray, codec: str = "ffv1", pix_fmt: str = "bgr0", *, rate: int = 10,
        times: Sequence[int] | None = None, aspect: Fraction | None = None, **options: str,
    ) -> Path:  # fmt: skip
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.codec_context.thread_count = pix_fmt, 1
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            for time, array in zip(range(len(frames)) if times is None else times, frames, strict=True):
                frame = av.VideoFrame.from_ndarray(array)
                frame.pts, frame.time_base = time, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def decode_plainly() -> Callable[[Path], list[tuple[Fraction, np.ndarray]]]:
    """``(time, (H, W, 3) uint8)`` of every frame, as PyAV decodes a file from its beginning to its end."""
    import av

    def decode(path: Path) -> list[tuple[Fraction, np.ndarray]]:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            return [(f.pts * stream.time_base, f.to_ndarray(format="rgb24")) for f in container.decode(stream)]

    return decode
