"""What is read of a file: an image or a clip, always of the same shape.

Shape legend: F frames, H W height and width, S side of a square, Z f h w latents (see ``latents.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from flexidit import clips, images
from flexidit.clips import ClipSettings, read_clip
from flexidit.draws import Draw, draw_start
from flexidit.images import read_pixels
from flexidit.latents import Codec, latent_size


class SampleReader(Protocol):
    """Makes samples of files. Equal readers make equal samples."""

    noun: ClassVar[str]
    """What a file is called: image, clip."""
    suffixes: ClassVar[frozenset[str]]
    """Of its files, with the point, in lower case."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What belongs to the fingerprint of latents: size and crop."""

    def latent_size(self, codec: Codec) -> tuple[int, ...]:
        """Size of one sample's latents; ValueError if the codec cannot make them."""

    def read(self, source: Path | bytes, draw: Draw | None = None, seed: int = 0) -> Tensor:
        """Pixels in [-1, 1].

        Args:
            source: a file, or its content.
            draw: sample and epoch, which key the part of the file that is read, if there is a choice of it.
            seed: of that choice.

        Raises:
            BrokenFileError: if the file cannot be used.
        """


@dataclass(frozen=True)
class ImageReader:
    """The square centre of an image: (3, S, S)."""

    size: int = 256
    """S."""

    noun: ClassVar[str] = "image"
    suffixes: ClassVar[frozenset[str]] = images.IMAGE_SUFFIXES

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the side of images is at least 1, got {self.size}")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Side and crop."""
        return {"image_size": self.size, "crop": images.CROP}

    def latent_size(self, codec: Codec) -> tuple[int, ...]:
        """(Z, h, w)."""
        return latent_size(codec, self.size)

    def read(self, source: Path | bytes, draw: Draw | None = None, seed: int = 0) -> Tensor:
        """(3, S, S); there is nothing to choose."""
        return read_pixels(source, self.size)


@dataclass(frozen=True)
class ClipReader:
    """A window of a clip, cropped: (3, F, H, W)."""

    settings: ClipSettings
    draws_window: bool = False
    """Whether the window is drawn by sample and epoch; else it is the middle one, as stored latents have it."""

    noun: ClassVar[str] = "clip"
    suffixes: ClassVar[frozenset[str]] = clips.CLIP_SUFFIXES

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Frames, rate, sizes and crop."""
        settings = self.settings
        size: Mapping[str, Any] = {"num_frames": settings.num_frames, "fps": settings.fps, "size": list(settings.size)}
        return {**size, "crop": clips.CROP}

    def latent_size(self, codec: Codec) -> tuple[int, ...]:
        """(Z, f, h, w)."""
        return latent_size(codec, self.settings.size, self.settings.num_frames)

    def read(self, source: Path | bytes, draw: Draw | None = None, seed: int = 0) -> Tensor:
        """(3, F, H, W)."""
        is_drawn = self.draws_window and draw is not None
        return read_clip(source, self.settings, draw_start(seed, draw) if is_drawn and draw else 0.5)
