"""Small runs of all training modules on all kinds of data, that can be killed and resumed.

A run writes the loss of every micro-batch into a ledger as it goes, one file a rank, so that what a killed run did is
known too; and all its state into ``last.ckpt`` at every second step.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import webdataset as wds
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from callbacks.ema import EMA
from datamodules.captioned_digits import CaptionedDigitsDataModule
from datamodules.digits import DigitsDataModule
from datamodules.imagenet import ImageNetDataModule
from datamodules.moving_digits import MovingDigitsDataModule
from datamodules.text_image import TextImageDataModule
from datamodules.text_video import TextVideoDataModule
from flexidit import create_model
from flexidit.caption_shards import encode_captioned
from flexidit.captioned_images import find_captioned_clips, find_captioned_images
from flexidit.checkpoint import save_checkpoint
from flexidit.clips import ClipSettings
from flexidit.images import find_images
from flexidit.latent_encoding import EncodeSettings, encode_images
from flexidit.latents import Moments, PixelCodec
from flexidit.sample_readers import ClipReader, ImageReader
from flexidit.text import make_text_encoder
from lightning_modules import ClassConditional, TextToImage, TextToVideo
from lightning_modules.base import DiffusionModule
from lightning_modules.checkpoint_io import StreamingCheckpointIO
from lightning_modules.settings import FlexSettings, MatchingSettings, OptimizerSettings, TargetSettings

STEPS, EVERY = 12, 2
GLOBAL_BATCH = 8
WORDS = "words:8x6"
SMALL = {"depth": 1, "hidden_size": 32, "num_heads": 2}
CAPTIONED = {**SMALL, "caption_channels": 8, "caption_length": 6}


@dataclass(frozen=True)
class Case:
    """One combination of what a resume has to bring back."""

    data: str
    """Key of ``DATA``; its beginning names the module."""
    processes: int = 1
    accumulate: int = 1
    workers: int = 0
    draws: bool = False
    """Whether a callback draws from all global generators."""
    steps: int = STEPS
    """Length of the run."""
    accelerator: str = "cpu"
    """On "cuda", with deterministic algorithms."""
    precision: Any = "32-true"

    @property
    def name(self) -> str:
        """Short and complete."""
        parts = [f"{self.processes} proc", f"acc {self.accumulate}", f"{self.workers} workers"]
        device = [] if self.accelerator == "cpu" else [self.accelerator, self.precision]
        return ", ".join([self.data, *parts, *(["global draws"] if self.draws else []), *device])

    @property
    def batch_size(self) -> int:
        """Of a process and micro-batch: all cases have the same global batch."""
        return GLOBAL_BATCH // self.processes // self.accumulate


CASES = [
    Case("class digits", draws=True),
    Case("class digits", processes=2, draws=True),
    Case("class latents", processes=2),
    Case("class latents", accumulate=2, workers=2),
    Case("image tars", processes=2, workers=2),
    Case("image tars", accumulate=2),
    Case("image latents", processes=2, accumulate=2),
    Case("image digits", workers=2),
    Case("video digits", processes=2, accumulate=2),
    Case("video latents", accumulate=2),
    Case("video latents", processes=2),
]
"""A covering set: each module with each of its kinds of data, with 1 and 2 processes, with and without accumulation;
each kind of loader with and without workers."""

CUDA_CASES = [
    Case("class digits", accumulate=2, draws=True, accelerator="cuda"),
    Case("class latents", workers=2, draws=True, accelerator="cuda", precision="bf16-mixed"),
    Case("image tars", workers=2, accelerator="cuda", precision="16-mixed"),
    Case("video latents", accumulate=2, accelerator="cuda", precision="bf16-mixed"),
]
"""On one GPU: fused AdamW, which leaves out steps by itself; a loss scaler; CUDA's own generator."""


def module_of(case: Case, folder: Path) -> DiffusionModule:
    """The training module of a case; of captions with two weak sizes, which a step trains one of."""
    target = TargetSettings(checkpoint=str(folder / f"{case.data}.safetensors"))
    optimizer = OptimizerSettings(lr=1e-2, weight_decay=1e-2, warmup_steps=8)
    if case.data.startswith("class"):
        matching = MatchingSettings(0.5, start_step=1, every_n_steps=2, chain={"4": 1, "2": 1}, num_timesteps=50)
        return ClassConditional(target, FlexSettings([4]), matching, optimizer, seed=3)
    if case.data.startswith("image"):
        return TextToImage(target, FlexSettings([4, 8], recipe="lora", rank=4), optimizer, seed=3)
    flex = FlexSettings(["2x2x2", "1x4x4"], recipe="lora", rank=4)
    return TextToVideo(target, flex, optimizer, seed=3)


def data_of(case: Case, folder: Path) -> pl.LightningDataModule:
    """The data of a case."""
    return DATA[case.data](str(folder / case.data), batch_size=case.batch_size, num_workers=case.workers, seed=5)


def _images(root: str, **options: Any) -> pl.LightningDataModule:
    return ImageNetDataModule(root, image_size=8, num_classes=10, val_fraction=0.25, **options)


def _captioned(root: str, **options: Any) -> pl.LightningDataModule:
    held_out = 0.0 if root.endswith("tars") else 0.25
    words = WORDS if root.endswith("tars") else None
    return TextImageDataModule(
        root, image_size=8, val_fraction=held_out, text_encoder=words, shuffle_buffer=8, **options
    )


def _clips(root: str, **options: Any) -> pl.LightningDataModule:
    return TextVideoDataModule(root, num_frames=4, fps=None, size=(8, 8), val_fraction=0.25, **options)


DATA: dict[str, Callable[..., pl.LightningDataModule]] = {
    "class digits": lambda root, **options: DigitsDataModule(val_fraction=0.97, **options),
    "class latents": _images,
    "image tars": _captioned,
    "image latents": _captioned,
    "image digits": lambda root, **options: CaptionedDigitsDataModule(val_fraction=0.97, **options),
    "video digits": lambda root, **options: MovingDigitsDataModule(12, 4, 8, val_fraction=0.97, **options),
    "video latents": _clips,
}
"""So few samples that an epoch has 3 to 7 steps: a run is of several, and most checkpoints are in the middle of one."""

TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "class digits": ("DiT-Tiny/2", {**SMALL, "input_size": 8, "in_channels": 1, "num_classes": 10}),
    "class latents": ("DiT-Tiny/2", {**SMALL, "input_size": 8, "in_channels": 3, "num_classes": 10}),
    "image tars": ("TextDiT-Tiny/2", {**CAPTIONED, "input_size": 8, "in_channels": 3}),
    "image latents": ("TextDiT-Tiny/2", {**CAPTIONED, "input_size": 8, "in_channels": 3}),
    "image digits": ("TextDiT-Tiny/2", {**SMALL, "input_size": 8, "in_channels": 1}),
    "video digits": ("VideoDiT-Tiny", {**SMALL, "input_size": (4, 12, 12), "in_channels": 1}),
    "video latents": ("Wan-Tiny", {**CAPTIONED, "input_size": (4, 8, 8), "in_channels": 3}),
}


class Ledger(Callback):
    """Writes down the loss of every micro-batch, so that it survives the process."""

    def __init__(self, path: Path) -> None:
        self.path, self.step = path, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {"step": self.step, "batch": batch_idx, "loss": outputs["loss"].item().hex()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Draws(Callback):
    """What a user's callback may do: disturbs images by draws from all global generators, also in validation.

    More often on higher ranks, that their generators differ.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *args: Any) -> None:
        for _ in range(1 + trainer.global_rank):
            drawn = torch.randn(()) + np.random.randn() + random.gauss(0, 1)
            batch["x"] += 0.1 * (drawn + torch.randn((), device=batch["x"].device))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        self.on_train_batch_start(trainer, pl_module, batch)


def train(case: Case, inputs: Path, folder: Path) -> None:
    """What each process of a run does: train to the end, from ``last.ckpt`` on if it is there."""
    last = folder / "last.ckpt"
    pl.seed_everything(12 if last.exists() else 11, verbose=False)  # a resume has to find its states in the checkpoint
    module, data = module_of(case, inputs), data_of(case, inputs)
    trainer = pl.Trainer(
        accelerator=case.accelerator,
        precision=case.precision,
        deterministic=True,
        devices=case.processes,
        strategy="ddp" if case.processes > 1 else "auto",
        max_steps=case.steps,
        max_epochs=-1,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=0.5,
        plugins=[StreamingCheckpointIO()],
        callbacks=[EMA(0.8), *([Draws()] if case.draws else []), ledger := Ledger(folder), _saving(folder)],
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        check_val_every_n_epoch=None,
        val_check_interval=5,
        default_root_dir=folder,
    )
    ledger.path = folder / f"ledger{trainer.global_rank}.jsonl"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)


def _saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=EVERY, save_top_k=0, save_last=True)


def prepare(folder: Path) -> None:
    """Targets and data of all cases: random weights and images."""
    torch.manual_seed(0)
    for name, (variant, overrides) in TARGETS.items():
        model = create_model(variant, **overrides)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)  # a fresh model outputs zero
        save_checkpoint(model, folder / f"{name}.safetensors")
    _write_images(folder / "images", 32)
    settings, encoder = EncodeSettings(ImageReader(8), shard_size=8, dtype="float32"), make_text_encoder(WORDS)
    encode_images(find_images(folder / "images"), Blurred(), folder / "class latents", settings)
    captioned = find_captioned_images(folder / "images")
    without = EncodeSettings(ImageReader(8), shard_size=8, dtype="float32", flip=False)
    encode_captioned(captioned, encoder, Blurred(), folder / "image latents", without)
    _write_tars(folder / "images", folder / "image tars")
    _write_clips(folder / "clips", 32)
    clips = EncodeSettings(ClipReader(ClipSettings(4, (8, 8), None)), shard_size=8, dtype="float32", flip=False)
    encode_captioned(find_captioned_clips(folder / "clips"), encoder, Blurred(), folder / "video latents", clips)


class Blurred(PixelCodec):
    """Latents with a deviation, that each epoch draws anew."""

    is_deterministic = False

    def encode_moments(self, pixels: Tensor) -> Moments:
        return Moments(pixels, torch.full_like(pixels, 0.1))


def _write_images(folder: Path, count: int) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / str(number % 10) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"number {number} one\nnumber {number} two")


def _write_tars(images: Path, folder: Path) -> None:
    folder.mkdir()
    files = sorted(images.rglob("*.png"))
    for tar in range(4):
        with wds.TarWriter(str(folder / f"{tar}.tar")) as writer:
            for path in files[tar::4]:
                text = path.with_suffix(".txt").read_text()
                writer.write({"__key__": path.stem, "png": path.read_bytes(), "txt": text})


def _write_clips(folder: Path, count: int) -> None:
    from PIL import Image

    rng = np.random.default_rng(1)
    folder.mkdir()
    for number in range(count):
        frames = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(4)]
        content = io.BytesIO()
        frames[0].save(content, "gif", save_all=True, append_images=frames[1:], duration=100)
        (folder / f"{number:02d}.gif").write_bytes(content.getvalue())
        (folder / f"{number:02d}.txt").write_text(f"clip {number} one\nclip {number} two")
