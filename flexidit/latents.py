"""Pixels and latents: the one door to a VAE, scaled for the model on its inside.

Images and clips go through the same door: what is said of (N, C, H, W) holds of (N, C, F, H, W). A VAE of images takes
the frames of a clip one by one; a VAE of clips takes clips only.

Shape legend: N batch, C channels, F frames, H W height and width in pixels, Z latent channels, f latent frames, h w
latent height and width (H / downscale). Pixels are in [-1, 1]. A codec is not an ``nn.Module``: held by whatever
trains, it never becomes part of its parameters, its checkpoints or its sharding.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexidit.vae_layout import VaeLayout, read_layout
from flexidit.vae_loading import load_vae, weights_sha256

CodecDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Moments:
    """Gaussian that a VAE gives for a batch of images or clips, scaled for the model."""

    mean: Tensor
    """(N, Z, h, w) or (N, Z, f, h, w), float32."""
    std: Tensor
    """Of the same shape, float32; zero for a deterministic encoder."""

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``, with standard normal noise of the same shape."""
        return self.mean + self.std * noise


class PixelCodec:
    """The codec of models that work on pixels: nothing happens, except that decoded pixels are clamped to [-1, 1].

    Args:
        channels: image channels, 3 for RGB and 1 for grey.
    """

    downscale = temporal_downscale = frame_step = 1
    is_deterministic = True
    is_video = False

    def __init__(self, channels: int = 3) -> None:
        self.latent_channels = channels

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies this representation."""
        return {"class": "PixelCodec", "latent_channels": self.latent_channels, "downscale": 1}

    def to(self, device: torch.device | str) -> "PixelCodec":
        """Nothing to move; for symmetry with :class:`LatentCodec`."""
        return self

    def encode_moments(self, pixels: Tensor) -> Moments:
        """The pixels themselves, with zero deviation."""
        return Moments(pixels, torch.zeros_like(pixels))

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The pixels themselves."""
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels clamped to [-1, 1], of the same shape."""
        return latents.clamp(-1, 1)


class LatentCodec:
    """A pre-trained VAE that speaks the model's scale: ``latents = (z - shift) * scale``.

    Shift and scale are the VAE's own (its ``config.json``): SD's have one factor (diffusers' default is 0.18215),
    TAESD's factor is 1, because its latents come out already scaled, Wan's have a mean and a deviation for each
    channel. The weights are read at the first use, kept in float32, frozen.

    Args:
        source: folder of a diffusers ``AutoencoderKL`` or ``AutoencoderTiny`` (images), ``AutoencoderKLWan`` or
            ``AutoencoderKLCogVideoX`` (clips), or of a pipeline with a ``vae`` folder, or a hub id of one.
        device: where the VAE runs; results return to the device of the input.
        dtype: precision of its convolutions, through autocast. VAEs that ask for it (``force_upcast``) run in
            float32 instead of float16, where SD's overflow.
        batch_size: images, or frames of clips, that go through at once, which bounds memory; a GPU wants more than
            the default. A VAE of clips takes a whole clip at least.
        tiling: run large images and clips in overlapping tiles, as the VAE's class does it: less memory, and slightly
            other values near the seams. An ``AutoencoderTiny`` needs little memory, and runs whole.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: CodecDtype = "float32",
        batch_size: int = 4,
        tiling: bool = False,
    ) -> None:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"the codec's dtype is float32, float16 or bfloat16, got {dtype!r}")
        if batch_size < 1:
            raise ValueError(f"the codec's batch_size is at least 1, got {batch_size}")
        self.source = source
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.batch_size, self.tiling = batch_size, tiling

    @cached_property
    def vae(self) -> nn.Module:
        """The frozen diffusers model, in float32."""
        vae: Any = load_vae(self.source)
        if self.tiling and type(vae).__name__ != "AutoencoderTiny":  # its tiles presume 8 pixels and 4 channels
            vae.enable_tiling()
        return vae.to(self.device)

    @cached_property
    def layout(self) -> VaeLayout:
        """What its configuration says."""
        return read_layout(type(self.vae).__name__, self.vae.config)  # type: ignore[arg-type]

    @property
    def latent_channels(self) -> int:
        """Z."""
        return self.layout.latent_channels

    @property
    def downscale(self) -> int:
        """Pixels per latent position along height and width."""
        return self.layout.downscale

    @property
    def temporal_downscale(self) -> int:
        """Frames per latent frame after the first; 1 for a VAE of images."""
        return self.layout.temporal_downscale

    @property
    def frame_step(self) -> int:
        """Clips have one frame more than a multiple of it."""
        return self.layout.frame_step

    @property
    def is_video(self) -> bool:
        """Whether it takes clips and no images."""
        return self.layout.is_video

    @property
    def is_deterministic(self) -> bool:
        """Whether the encoder gives one latent instead of a distribution."""
        return self.layout.is_deterministic

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the latents: equal fingerprints mean interchangeable latents."""
        temporal = {"temporal_downscale": self.temporal_downscale} if self.is_video else {}
        return {
            "class": type(self.vae).__name__,
            "weights_sha256": weights_sha256(self.vae),
            **self.layout.scaling,
            "latent_channels": self.latent_channels,
            "downscale": self.downscale,
            **temporal,
        }

    def to(self, device: torch.device | str) -> "LatentCodec":
        """Move the VAE; returns itself."""
        device = torch.device(device)
        if device != self.device:
            self.device = device
            if "vae" in self.__dict__:
                self.vae.to(device)
        return self

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Moments:
        """Mean and deviation of the latents: (N, 3, H, W) in [-1, 1] -> two (N, Z, h, w), float32; clips likewise.

        Raises:
            ValueError: if the shape does not fit the VAE.
        """
        self._check_pixels(pixels)
        mean, std = self._batched(self._encode_chunk, pixels, frames=pixels.shape[2]).unbind(0)
        return Moments(mean, std)

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents for the model: (N, 3, H, W) in [-1, 1] -> (N, Z, h, w), float32; clips likewise.

        Args:
            pixels: images or clips.
            noise: standard normal, of the shape of the latents; None gives the mean.
        """
        moments = self.encode_moments(pixels)
        return moments.mean if noise is None else moments.sample(noise.to(moments.mean.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of the model's latents: (N, Z, h, w) -> (N, 3, H, W) in [-1, 1], float32; clips likewise.

        Raises:
            ValueError: if the shape does not fit the VAE.
        """
        self._check_latents(latents)
        return self._batched(self._decode_chunk, latents, frames=self._num_frames(latents.shape[2])).squeeze(0)

    def _num_frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.temporal_downscale

    def _check_pixels(self, pixels: Tensor) -> None:
        channels, sides = self.layout.pixel_channels, pixels.shape[-2:]
        divides = not any(side % self.downscale for side in sides)
        if pixels.ndim not in self._ndims or pixels.shape[1] != channels or not divides:
            raise ValueError(
                f"this VAE encodes pixels of shape (N, {channels}, {'F, ' * self.is_video}H, W) with H and W divisible "
                f"by {self.downscale}, got {tuple(pixels.shape)}"
            )
        if self.is_video:
            check_frames(self, pixels.shape[2])

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim not in self._ndims or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"this VAE decodes latents of shape (N, {self.latent_channels}, {'f, ' * self.is_video}h, w), "
                f"got {tuple(latents.shape)}"
            )
        if self.is_video:
            check_frames(self, self._num_frames(latents.shape[2]))

    @property
    def _ndims(self) -> tuple[int, ...]:
        return (5,) if self.is_video else (4, 5)

    def _batched(self, run: Callable[[Tensor], Tensor], x: Tensor, frames: int) -> Tensor:
        """Run over chunks of the samples on the VAE's device; results are stacked parts, (parts, N, ...)."""
        if x.ndim == 5 and not self.is_video:  # frames become images, and images frames again
            images = self._in_chunks(run, x.transpose(1, 2).flatten(0, 1), self.batch_size)
            return images.unflatten(1, (len(x), -1)).transpose(2, 3)
        return self._in_chunks(run, x, max(1, self.batch_size // frames) if self.is_video else self.batch_size)

    def _in_chunks(self, run: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
        chunks = []
        for chunk in x.split(size):
            with self._autocast():
                out = run(chunk.to(self.device, torch.float32))
            chunks.append(out.float().to(x.device))
        return torch.cat(chunks, dim=1)

    def _autocast(self) -> AbstractContextManager[Any]:
        config: Any = self.vae.config
        overflows = self.dtype == torch.float16 and bool(config.get("force_upcast"))
        enabled = self.dtype != torch.float32 and not overflows
        return torch.autocast(self.device.type, self.dtype if enabled else torch.bfloat16, enabled=enabled)

    def _encode_chunk(self, pixels: Tensor) -> Tensor:
        encoded = self.vae.encode(pixels)  # type: ignore[operator]
        if self.is_deterministic:
            mean, std = encoded.latents.float(), torch.zeros_like(encoded.latents, dtype=torch.float32)
        else:
            mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        shift, scale = self._shift_and_scale(mean)
        return torch.stack([(mean - shift) * scale, std * scale])

    def _decode_chunk(self, latents: Tensor) -> Tensor:
        shift, scale = self._shift_and_scale(latents)
        return self.vae.decode(latents / scale + shift).sample.clamp(-1, 1).unsqueeze(0)  # type: ignore[operator]

    def _shift_and_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """One number or one a channel, to be broadcast over latents."""
        shape = (1, -1, *[1] * (z.ndim - 2))
        layout = self.layout
        return z.new_tensor(layout.shift).view(shape), z.new_tensor(layout.scale).view(shape)


Codec = LatentCodec | PixelCodec


def check_frames(codec: Codec, num_frames: int) -> None:
    """Refuse a length of clips that the VAE would not give back.

    Raises:
        ValueError: with the nearest length that it would.
    """
    steps, rest = divmod(num_frames - 1, codec.frame_step)
    if num_frames < 1 or rest:
        nearest = 1 + max(0, steps + (2 * rest > codec.frame_step)) * codec.frame_step
        raise ValueError(
            f"clips of {num_frames} frames do not fit the VAE, which takes 1 more than a multiple of "
            f"{codec.frame_step}: try {nearest}"
        )


def latent_size(codec: Codec, size: int | tuple[int, int], num_frames: int | None = None) -> tuple[int, ...]:
    """(Z, h, w) of an image, (Z, f, h, w) of a clip.

    Args:
        codec: the VAE, or pixels.
        size: (H, W), or the side of a square.
        num_frames: F of a clip; None for an image.

    Raises:
        ValueError: if the VAE does not divide the sides or takes no such number of frames, or none at all.
    """
    height, width = (size, size) if isinstance(size, int) else size
    step = codec.downscale
    if min(height, width) < 1 or height % step or width % step:
        nearest = [max(1, side // step) * step for side in (height, width)]
        asked, better = (_side_or_sides(*sides) for sides in ((height, width), nearest))
        raise ValueError(f"size {asked} is not divisible by the VAE's {step}: try {better}")
    frames = () if num_frames is None else (_latent_frames(codec, num_frames),)
    if codec.is_video and num_frames is None:
        raise ValueError("this VAE is for clips and not for images: give clips and their number of frames")
    return codec.latent_channels, *frames, height // step, width // step


def _latent_frames(codec: Codec, num_frames: int) -> int:
    check_frames(codec, num_frames)
    return 1 + (num_frames - 1) // codec.temporal_downscale


def _side_or_sides(height: int, width: int) -> str:
    return str(height) if height == width else f"{height}x{width}"


def pixel_size(codec: Codec, size: Sequence[int]) -> tuple[int, ...]:
    """Size of what is decoded from latents of a size: (h, w) -> (H, W), (f, h, w) -> (F, H, W)."""
    *frames, height, width = size
    lengths = (1 + (length - 1) * codec.temporal_downscale for length in frames)
    return *lengths, height * codec.downscale, width * codec.downscale
