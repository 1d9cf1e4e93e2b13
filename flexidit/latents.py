"""Pixels and latents: the one door to a VAE, scaled for the model on its inside.

Shape legend: N batch, C channels, H W image height and width in pixels, Z latent channels, h w latent height and
width (H / downscale). Pixels are in [-1, 1]. A codec is not an ``nn.Module``: held by whatever trains, it never
becomes part of its parameters, its checkpoints or its sharding.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

CodecDtype = Literal["float32", "float16", "bfloat16"]
_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class Moments:
    """Gaussian that a VAE gives for a batch of images, scaled for the model."""

    mean: Tensor
    """(N, Z, h, w) float32."""
    std: Tensor
    """(N, Z, h, w) float32; zero for a deterministic encoder."""

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``, with standard normal noise of the same shape."""
        return self.mean + self.std * noise


class PixelCodec:
    """The codec of models that work on pixels: nothing happens, except that decoded pixels are clamped to [-1, 1].

    Args:
        channels: image channels, 3 for RGB and 1 for grey.
    """

    downscale = 1
    is_deterministic = True

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
        """The pixels themselves: (N, C, H, W) -> (N, C, H, W)."""
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels clamped to [-1, 1]: (N, C, H, W) -> (N, C, H, W)."""
        return latents.clamp(-1, 1)


class LatentCodec:
    """A pre-trained VAE that speaks the model's scale: ``latents = (z - shift_factor) * scaling_factor``.

    Both factors are the VAE's own (its ``config.json``; diffusers' default for SD's VAEs is 0.18215). TAESD's factor
    is 1, because its latents come out already scaled. The weights are read at the first use, kept in float32, frozen.

    Args:
        source: folder of a diffusers ``AutoencoderKL`` or ``AutoencoderTiny`` (or of a pipeline with a ``vae``
            folder), or a hub id of one.
        device: where the VAE runs; results return to the device of the input.
        dtype: precision of its convolutions, through autocast. VAEs that ask for it (``force_upcast``) run in
            float32 instead of float16, where SD's overflow.
        batch_size: images that go through at once, which bounds memory; a GPU wants more than the default.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: CodecDtype = "float32",
        batch_size: int = 4,
    ) -> None:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"the codec's dtype is float32, float16 or bfloat16, got {dtype!r}")
        if batch_size < 1:
            raise ValueError(f"the codec's batch_size is at least 1, got {batch_size}")
        self.source = source
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.batch_size = batch_size

    @cached_property
    def vae(self) -> nn.Module:
        """The frozen diffusers model, in float32."""
        return load_vae(self.source).to(self.device)

    @property
    def latent_channels(self) -> int:
        """Z."""
        return int(self._config("latent_channels"))

    @property
    def downscale(self) -> int:
        """Pixels per latent position along each side: every stage of the encoder but one halves."""
        name = "block_out_channels" if self._is_kl else "encoder_block_out_channels"
        return int(2 ** (len(self._config(name)) - 1))

    @property
    def scaling_factor(self) -> float:
        """What encoded latents are multiplied by."""
        return float(self._config("scaling_factor"))

    @property
    def shift_factor(self) -> float:
        """What is subtracted from encoded latents before scaling; 0 for most VAEs."""
        return float(self._config("shift_factor") or 0.0)

    @property
    def is_deterministic(self) -> bool:
        """Whether the encoder gives one latent instead of a distribution."""
        return not self._is_kl

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the latents: equal fingerprints mean interchangeable latents.

        The weights are hashed in float32, tensor by tensor, so that the file format, its dtype of equal values and
        the folder's name do not matter.
        """
        return {
            "class": type(self.vae).__name__,
            "weights_sha256": _weights_sha256(self.vae),
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latent_channels": self.latent_channels,
            "downscale": self.downscale,
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
        """Mean and deviation of the latents: (N, 3, H, W) in [-1, 1] -> two (N, Z, h, w), float32.

        Raises:
            ValueError: if the shape does not fit the VAE.
        """
        self._check_pixels(pixels)
        mean, std = self._batched(self._encode_chunk, pixels).chunk(2)
        return Moments(mean.squeeze(0), std.squeeze(0))

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents for the model: (N, 3, H, W) in [-1, 1] -> (N, Z, h, w), float32.

        Args:
            pixels: images.
            noise: (N, Z, h, w) standard normal; None gives the mean.
        """
        moments = self.encode_moments(pixels)
        return moments.mean if noise is None else moments.sample(noise.to(moments.mean.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of the model's latents: (N, Z, h, w) -> (N, 3, H, W) in [-1, 1], float32.

        Raises:
            ValueError: if the number of channels is not the VAE's.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"this VAE decodes latents of shape (N, {self.latent_channels}, h, w), got {tuple(latents.shape)}"
            )
        return self._batched(self._decode_chunk, latents).squeeze(0)

    @property
    def _is_kl(self) -> bool:
        return type(self.vae).__name__ == "AutoencoderKL"

    def _config(self, name: str) -> Any:
        return self.vae.config.get(name)  # type: ignore[union-attr, operator]

    def _check_pixels(self, pixels: Tensor) -> None:
        channels = int(self._config("in_channels"))
        divides = not any(side % self.downscale for side in pixels.shape[2:])
        if pixels.ndim != 4 or pixels.shape[1] != channels or not divides:
            raise ValueError(
                f"this VAE encodes pixels of shape (N, {channels}, H, W) with H and W divisible by {self.downscale}, "
                f"got {tuple(pixels.shape)}"
            )

    def _batched(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run over chunks of dimension 0 on the VAE's device; results are stacked parts, (parts, N, ...)."""
        chunks = []
        for chunk in x.split(self.batch_size):
            with self._autocast():
                out = run(chunk.to(self.device, torch.float32))
            chunks.append(out.float().to(x.device))
        return torch.cat(chunks, dim=1)

    def _autocast(self) -> AbstractContextManager[Any]:
        overflows = self.dtype == torch.float16 and bool(self._config("force_upcast"))
        enabled = self.dtype != torch.float32 and not overflows
        return torch.autocast(self.device.type, self.dtype if enabled else torch.bfloat16, enabled=enabled)

    def _encode_chunk(self, pixels: Tensor) -> Tensor:
        encoded = self.vae.encode(pixels)  # type: ignore[operator]
        if self._is_kl:
            mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        else:
            mean, std = encoded.latents.float(), torch.zeros_like(encoded.latents, dtype=torch.float32)
        return torch.stack([(mean - self.shift_factor) * self.scaling_factor, std * self.scaling_factor])

    def _decode_chunk(self, latents: Tensor) -> Tensor:
        z = latents / self.scaling_factor + self.shift_factor
        return self.vae.decode(z).sample.clamp(-1, 1).unsqueeze(0)  # type: ignore[operator]


def load_vae(source: str | Path) -> nn.Module:
    """Read a frozen VAE from a folder or the hub, safetensors only.

    Raises:
        FileNotFoundError: if a path holds no VAE.
        ValueError: if it is another model, its weights are incomplete or damaged, or the hub cannot be reached.
    """
    import diffusers
    from safetensors import SafetensorError

    location, subfolder = _locate(source)
    options: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    try:
        name = diffusers.AutoencoderKL.load_config(location, **options).get("_class_name")
        if name in _CLASSES:
            options |= {"use_safetensors": True, "torch_dtype": torch.float32, "output_loading_info": True}
            with _quiet():  # AutoencoderTiny warns about a field of its own configuration
                vae, info = getattr(diffusers, name).from_pretrained(location, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(_unavailable(source, error)) from error
    if name not in _CLASSES:
        raise ValueError(f"{source} is a {name}, not a VAE that is supported: {' or '.join(_CLASSES)}")
    if info["missing_keys"]:  # diffusers would leave these at random values, with a warning only
        raise ValueError(f"the weights of {source} lack {len(info['missing_keys'])} tensors of {name}")
    return vae.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _locate(source: str | Path) -> tuple[str, str | None]:
    """``(folder or hub id, subfolder)``; what looks like a path must exist."""
    path = Path(source).expanduser()
    if path.is_dir():
        for subfolder in (None, "vae"):
            config = path / (subfolder or "") / "config.json"
            if config.is_file() and "_class_name" in json.loads(config.read_text(encoding="utf-8")):
                return str(path), subfolder
        raise FileNotFoundError(f"no VAE in {path}: expected config.json and diffusion_pytorch_model.safetensors")
    text = str(source)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(f"no VAE at {text}: give a diffusers VAE folder, or a hub id such as owner/name")
    return text, None


def _unavailable(source: str | Path, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(source).expanduser().is_dir():
        return f"the VAE in {source} cannot be read ({first}): download it again"
    return f"{source} is no local folder and the hub did not deliver it ({first}): give the path of a VAE folder"


def _weights_sha256(vae: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def latent_size(codec: LatentCodec | PixelCodec, image_size: int) -> tuple[int, int, int]:
    """(Z, h, w) of a square image.

    Raises:
        ValueError: if the VAE does not divide the image's side.
    """
    side, rest = divmod(image_size, codec.downscale)
    if rest or side < 1:
        nearest = max(1, math.floor(image_size / codec.downscale)) * codec.downscale
        raise ValueError(f"image size {image_size} is not divisible by the VAE's {codec.downscale}: try {nearest}")
    return codec.latent_channels, side, side
