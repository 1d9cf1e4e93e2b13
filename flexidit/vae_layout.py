"""What the configurations of diffusers' VAEs say, read into one form: channels, downscales, scaling.

Shape legend: Z latent channels, F frames of a clip, f latent frames.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class VaeLayout:
    """A VAE without its weights. Its model sees ``(z - shift) * scale``."""

    pixel_channels: int
    latent_channels: int
    """Z."""
    downscale: int
    """Pixels per latent position along height and width."""
    shift: tuple[float, ...]
    """One number, or one a channel."""
    scale: tuple[float, ...]
    """One number, or one a channel."""
    scaling: dict[str, Any]
    """The same as the configuration says it, for fingerprints."""
    is_deterministic: bool = False
    """Whether the encoder gives one latent instead of a distribution."""
    is_video: bool = False
    """Whether it works on clips; an image VAE takes their frames one by one."""
    temporal_downscale: int = 1
    """Frames per latent frame, after the first, which stands alone: f = 1 + (F - 1) / temporal_downscale."""
    frame_step: int = 1
    """F - 1 is a multiple of it: of other clips, frames would be lost or added without an error."""


def _kl(config: Config) -> VaeLayout:
    scaling = _one_factor(config)
    return VaeLayout(
        pixel_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        downscale=2 ** (len(config["block_out_channels"]) - 1),  # every stage but one halves
        shift=(scaling["shift_factor"],),
        scale=(scaling["scaling_factor"],),
        scaling=scaling,
    )


def _tiny(config: Config) -> VaeLayout:
    scaling = _one_factor(config)
    return VaeLayout(
        pixel_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        downscale=2 ** (len(config["encoder_block_out_channels"]) - 1),
        shift=(scaling["shift_factor"],),
        scale=(scaling["scaling_factor"],),
        scaling=scaling,
        is_deterministic=True,
    )


def _wan(config: Config) -> VaeLayout:
    """The stages decide; ``scale_factor_spatial`` beside them is only a note, and is wrong where stages differ.

    Wan's encoder reads the first frame and then four at a time, whatever its temporal downscale is.
    """
    mean, std = (tuple(float(value) for value in config[name]) for name in ("latents_mean", "latents_std"))
    patch = config.get("patch_size") or 1  # Wan 2.2 folds patches of pixels into channels first
    temporal = 2 ** sum(config["temperal_downsample"][: len(config["dim_mult"]) - 1])
    return VaeLayout(
        pixel_channels=config["in_channels"] // patch**2,
        latent_channels=config["z_dim"],
        downscale=patch * 2 ** (len(config["dim_mult"]) - 1),
        shift=mean,
        scale=tuple(1 / value for value in std),
        scaling={"latents_mean": list(mean), "latents_std": list(std)},
        is_video=True,
        temporal_downscale=temporal,
        frame_step=max(4, temporal),
    )


def _cogvideox(config: Config) -> VaeLayout:
    """CogVideoX decodes latent frames in pairs, the first three together, so their number is odd.

    Its configuration's ``latents_mean`` and ``latents_std`` are used by no pipeline, and ``invert_scale_latents``
    concerns the image that its image-to-video models start from, not clips, which every pipeline divides by
    ``scaling_factor`` before decoding.
    """
    scaling = _one_factor(config)
    temporal = int(config["temporal_compression_ratio"])
    return VaeLayout(
        pixel_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        downscale=2 ** (len(config["block_out_channels"]) - 1),
        shift=(scaling["shift_factor"],),
        scale=(scaling["scaling_factor"],),
        scaling=scaling,
        is_video=True,
        temporal_downscale=temporal,
        frame_step=2 * temporal,
    )


def _one_factor(config: Config) -> dict[str, float]:
    shift = config.get("shift_factor") or 0.0
    return {"scaling_factor": float(config["scaling_factor"]), "shift_factor": float(shift)}


_READERS: dict[str, Callable[[Config], VaeLayout]] = {
    "AutoencoderKL": _kl,
    "AutoencoderTiny": _tiny,
    "AutoencoderKLWan": _wan,
    "AutoencoderKLCogVideoX": _cogvideox,
}
SUPPORTED = tuple(_READERS)
"""Classes of diffusers."""


def read_layout(name: str, config: Config) -> VaeLayout:
    """The layout of a VAE of one of the supported classes."""
    return _READERS[name](config)
