"""What ``curve`` compares samples with: a feature extractor, and the statistics of real images in its features.

Shape legend: N images, C channels, H W height and width in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexidit.images import IMAGE_SUFFIXES, BrokenImageError, read_pixels
from flexidit.latents import LatentCodec, PixelCodec, pixel_size
from flexidit.metrics.curve import Reference, reference_of
from flexidit.metrics.digit_classifier import DigitClassifier, train_digit_classifier
from flexidit.metrics.features import (
    FeatureExtractor,
    InceptionFeatures,
    ResNet56Features,
    SqueezeNetFeatures,
)
from flexidit.metrics.frechet import FeatureStatistics
from flexidit.metrics.judges import Judge
from flexidit.skips import SkipReport

DIGITS = "digits"
FEATURES = ("inception", "squeezenet", "resnet56", DIGITS)

BATCH = 64
_FLOOR_SAMPLES = 500


@dataclass(frozen=True)
class Evaluator:
    """Features, reference, and what goes with them."""

    features: FeatureExtractor
    reference: Reference
    classifier: Callable[[Tensor], Tensor] | None = None
    """Pixels to class scores; None where no classifier knows the model's classes."""
    floor: float | None = None
    """Frechet distance of real images to the reference; None where it is not known."""
    skips: SkipReport | None = None
    """Reference images or clips that could not be read."""
    frame_features: FeatureExtractor | None = None
    """Of clips: those of their frames."""
    frame_reference: Reference | None = None
    """In these features; None where it is not known."""
    agreement: Judge | None = None
    """Of clips: who measures whether they show what their captions say."""


def make_evaluator(
    features: str | None,
    weights: Path | None,
    reference: str,
    sample_shape: tuple[int, ...],
    device: torch.device,
    num_samples: int,
) -> Evaluator:
    """The evaluator that the arguments describe.

    Args:
        features: One of :data:`FEATURES`; None: "digits" for the reference "digits", else "inception".
        weights: File of the feature network; None: Inception's are downloaded, the digits' are trained here.
        reference: An ``.npz`` of statistics, a folder of images, or "digits" (scikit-learn's, 1,797).
        sample_shape: (C, H, W) of the model's decoded samples; images of a folder are cropped to it as DiT does.
        device: Where the features are computed.
        num_samples: Samples per point, for the floor at the same number.

    Raises:
        ValueError: an unknown name, weights that are missing, or features that do not fit the reference.
    """
    name = features or (DIGITS if reference == DIGITS else "inception")
    extractor: Any = (_digit_classifier(sample_shape) if name == DIGITS else named_features(name, weights)).to(device)
    classifier = extractor.logits if name == DIGITS else None
    if reference == DIGITS:
        pixels, _ = _digits(sample_shape)
        statistics = reference_of(_batches(pixels), PixelCodec(1), extractor, "scikit-learn's digits")
        evaluator = Evaluator(extractor, statistics, classifier, floor_of(pixels, extractor, statistics, num_samples))
    elif Path(reference).is_dir():
        skips = SkipReport()
        batches = _folder_batches(Path(reference), sample_shape, skips)
        statistics = reference_of(batches, PixelCodec(3), extractor, Path(reference).name)
        evaluator = Evaluator(extractor, statistics, classifier, skips=skips)
    else:
        evaluator = Evaluator(extractor, load_statistics(reference), classifier)
    check_width(evaluator, sample_shape, device)
    return evaluator


def named_features(name: str, weights: Path | None) -> Any:
    """A network of that name, with its weights.

    Raises:
        ValueError: an unknown name, or weights that are missing.
    """
    if name == "inception":
        return InceptionFeatures(weights)
    if name not in FEATURES:
        raise ValueError(f"unknown features {name!r}; give one of {', '.join(FEATURES)}")
    if weights is None:
        raise ValueError(f"--features {name} needs --feature-weights, the file with its weights")
    return SqueezeNetFeatures(weights) if name == "squeezenet" else ResNet56Features(weights)


def _digit_classifier(sample_shape: tuple[int, ...]) -> DigitClassifier:
    """Trained on all real digits, a few seconds; the same every time."""
    return train_digit_classifier(*_digits(sample_shape))


def _digits(sample_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Real digits (1797, 1, H, W) in [-1, 1] and their labels (1797,)."""
    from flexidit.digit_images import load_digit_images

    channels, height, width = sample_shape
    if channels != 1 or height != width:
        raise ValueError(f"the digits are square and grey, this model makes {channels} channels of {height}x{width}")
    return load_digit_images(height)


def _batches(pixels: Tensor) -> Iterator[dict[str, Tensor]]:
    return ({"x": chunk} for chunk in pixels.split(BATCH))


def floor_of(pixels: Tensor, features: Any, reference: Reference, num_samples: int) -> float:
    """Some of the real samples against all of them: what a perfect sampler would get, by its finite number alone."""
    count = min(num_samples, _FLOOR_SAMPLES)
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
    statistics = FeatureStatistics()
    for batch in _batches(pixels[chosen]):
        statistics.update(features(batch["x"].to(next(features.parameters()).device)))
    return statistics.gaussian().distance(reference.statistics)


def _folder_batches(root: Path, sample_shape: tuple[int, ...], skips: SkipReport) -> Iterator[dict[str, Tensor]]:
    """Centre crops of all images under a folder, (N, 3, H, W); read in threads, as decoding lets others run."""
    _, height, width = sample_shape
    if height != width:
        raise ValueError(
            f"images are cropped to squares, this model makes {height}x{width}; give an .npz of statistics"
        )
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no images under {root}: looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), BATCH):
            chunk = files[start : start + BATCH]
            images = [image for image in pool.map(lambda path: _read(path, height, skips), chunk) if image is not None]
            if images:
                yield {"x": torch.stack(images)}


def _read(path: Path, size: int, skips: SkipReport) -> Tensor | None:
    try:
        return read_pixels(path, size)
    except BrokenImageError as error:
        skips.add(path.name, str(error))
        return None


def load_statistics(reference: str, kind: str = "images") -> Reference:
    """Read from a file.

    Raises:
        ValueError: it is none.
    """
    if not reference.endswith(".npz"):
        raise ValueError(f"no reference at {reference!r}; give an .npz of statistics, a folder of {kind}, or 'digits'")
    return Reference.load(reference)


@torch.no_grad()
def check_width(evaluator: Evaluator, sample_shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse statistics of other features before hours of sampling, not after."""
    num_features = evaluator.features(torch.zeros(1, *sample_shape, device=device)).shape[1]
    known = evaluator.reference.statistics.mean.numel()
    if num_features != known:
        raise ValueError(
            f"the reference {evaluator.reference.description} has {known} features and {evaluator.features.name} "
            f"gives {num_features}; choose --features as the reference was made"
        )


def sample_shape_of(model: Any, codec: LatentCodec | PixelCodec) -> tuple[int, ...]:
    """(C, H, W) of decoded images, (C, F, H, W) of clips."""
    channels = model.in_channels if isinstance(codec, PixelCodec) else 3
    return channels, *pixel_size(codec, model.input_size)
