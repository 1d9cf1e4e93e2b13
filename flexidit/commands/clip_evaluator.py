"""What ``curve`` compares clips with: features over clips and of single frames, and real clips in both.

Shape legend: N clips, C channels, F frames, H W height and width in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexidit.clips import CLIP_SUFFIXES, BrokenClipError, ClipSettings, read_clip
from flexidit.commands.evaluator import BATCH, DIGITS, Evaluator, check_width, floor_of, load_statistics, named_features
from flexidit.digit_images import NATIVE_SIZE
from flexidit.draws import Draw
from flexidit.files import files_below
from flexidit.metrics.clip_features import ClipFeatures, FrameFeatures
from flexidit.metrics.curve import Reference
from flexidit.metrics.frechet import FeatureStatistics
from flexidit.metrics.judges import MovingDigitAgreement
from flexidit.metrics.moving_digits import moving_digit_features, train_moving_digit_classifier
from flexidit.moving_digits import ClipFormat, MovingDigits
from flexidit.skips import SkipReport

_COEFFICIENTS = 3  # of a clip in time; more features need more clips


def make_clip_evaluator(
    features: str | None,
    weights: Path | None,
    reference: str,
    sample_shape: tuple[int, ...],
    device: torch.device,
    num_samples: int,
    fps: float | None = None,
) -> Evaluator:
    """The evaluator that the arguments describe.

    Args:
        features: A network of images, as for images; None: "digits" for moving digits, else "inception".
        weights: File of the feature network.
        reference: An ``.npz`` of statistics over clips, a folder of clips, or "digits": scikit-learn's, in motion,
            of 8 pixels, or "digits:16" of so many.
        sample_shape: (C, F, H, W) of the model's decoded samples.
        device: Where the features are computed.
        num_samples: Samples per point, for the floor at the same number.
        fps: Frames per second that are taken of the clips in a folder; None: all.

    Raises:
        FileNotFoundError, ValueError: as :func:`~flexidit.commands.evaluator.make_evaluator`.
    """
    clip = _digit_format(reference, sample_shape) if reference.partition(":")[0] == DIGITS else None
    name = features or ("inception" if clip is None else DIGITS)
    if name == DIGITS and clip is None:
        raise ValueError("--features digits are of moving digits; give --reference digits")
    network = _digit_network(clip) if name == DIGITS and clip is not None else named_features(name, weights)
    over_clips = ClipFeatures(network, min(_COEFFICIENTS, sample_shape[1])).to(device)
    of_frames = FrameFeatures(network).to(device)
    if clip is not None:
        evaluator = _digit_evaluator(clip, over_clips, of_frames, num_samples)
    elif Path(reference).is_dir():
        skips = SkipReport()
        batches = _folder_batches(Path(reference), sample_shape, fps, skips)
        evaluator = _evaluator(over_clips, of_frames, batches, Path(reference).name, skips)
    else:
        evaluator = Evaluator(over_clips, load_statistics(reference, "clips"))
    check_width(evaluator, sample_shape, device)
    return evaluator


def _digit_format(reference: str, sample_shape: tuple[int, ...]) -> ClipFormat:
    channels, frames, height, width = sample_shape
    if channels != 1 or height != width:
        raise ValueError(f"the digits are square and grey, this model makes {channels} channels of {height}x{width}")
    size = reference.partition(":")[2] or str(NATIVE_SIZE)
    if not size.isdecimal():
        raise ValueError(f"--reference {reference!r} does not say how large the digits are; write digits:16")
    return ClipFormat(height, frames, int(size))


def _digit_network(clip: ClipFormat) -> Any:
    """Trained on all real digits, some seconds; the same every time."""
    return moving_digit_features(clip.canvas_size, clip.num_frames, clip.digit_size)


def _digit_evaluator(clip: ClipFormat, over_clips: nn.Module, of_frames: nn.Module, num_samples: int) -> Evaluator:
    digits = MovingDigits(clip)
    clips, _ = digits.clips(0, [Draw(sample) for sample in range(len(digits))])
    batches = ({"x": chunk} for chunk in clips.split(BATCH))
    evaluator = _evaluator(over_clips, of_frames, batches, "scikit-learn's digits in motion", None)
    classifier = train_moving_digit_classifier(clip).to(next(over_clips.parameters()).device)
    floor = floor_of(clips, over_clips, evaluator.reference, num_samples)
    agreement = MovingDigitAgreement(classifier.logits, clip.digit_size)
    return Evaluator(
        evaluator.features,
        evaluator.reference,
        floor=floor,
        frame_features=evaluator.frame_features,
        frame_reference=evaluator.frame_reference,
        agreement=agreement,
    )


@torch.no_grad()
def _evaluator(
    over_clips: Any, of_frames: Any, batches: Iterator[dict[str, Tensor]], description: str, skips: SkipReport | None
) -> Evaluator:
    """Both references, in one reading of the clips."""
    device = next(over_clips.parameters()).device
    both, count = [(features, FeatureStatistics()) for features in (over_clips, of_frames)], 0
    for batch in batches:
        count += len(batch["x"])
        for features, statistics in both:
            statistics.update(features(batch["x"].to(device)))
    references = [
        Reference(statistics.gaussian(features.fingerprint), f"{description} ({count} clips)")
        for features, statistics in both
    ]
    return Evaluator(over_clips, references[0], skips=skips, frame_features=of_frames, frame_reference=references[1])


def _folder_batches(
    root: Path, sample_shape: tuple[int, ...], fps: float | None, skips: SkipReport
) -> Iterator[dict[str, Tensor]]:
    """Windows from the middle of all clips under a folder, (N, 3, F, H, W); decoding lets other threads run.

    Raises:
        FileNotFoundError: no clips, or none that is long enough and whole.
    """
    files = files_below(root, CLIP_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no clips under {root}: looked for {', '.join(sorted(CLIP_SUFFIXES))}")
    _, frames, height, width = sample_shape
    settings, found = ClipSettings(frames, (height, width), fps), 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), BATCH):
            chunk = files[start : start + BATCH]
            read = pool.map(lambda name: _read(root / name, settings, skips), chunk)
            clips = [clip for clip in read if clip is not None]
            found += len(clips)
            if clips:
                yield {"x": torch.stack(clips)}
    if found < 2:
        skipped = f"; {skips.summary('clip')}" if skips else ""
        raise FileNotFoundError(f"{root} has {found} clips that can be used, and statistics need 2{skipped}")


def _read(path: Path, settings: ClipSettings, skips: SkipReport) -> Tensor | None:
    try:
        return read_clip(path, settings)
    except BrokenClipError as error:
        skips.add(path.name, str(error))
        return None
