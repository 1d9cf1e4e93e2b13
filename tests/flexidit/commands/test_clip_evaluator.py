"""Real clips as the reference, over clips and per frame; what cannot be compared is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from flexidit.clip_files import encode_clip
from flexidit.clips import ClipSettings, read_clip
from flexidit.commands import clip_evaluator as module
from flexidit.commands.clip_evaluator import make_clip_evaluator
from flexidit.draws import Draw
from flexidit.metrics import moving_digits
from flexidit.metrics.digit_classifier import train_digit_classifier
from flexidit.metrics.frechet import FeatureStatistics
from flexidit.moving_captions import MovingDigit, moving_caption_of
from flexidit.moving_digits import DIRECTION_NAMES, ClipFormat, MovingDigits

CPU = torch.device("cpu")
SHAPE = (1, 4, 12, 12)


class Pool(nn.Module):
    """Means over quarters of an image."""

    name = fingerprint = "pool"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def quickly(x: torch.Tensor, y: torch.Tensor, seed: int, num_epochs: int, **options: int) -> nn.Module:
        return train_digit_classifier(x, y, seed, num_epochs=1, **options)

    monkeypatch.setattr(moving_digits, "train_digit_classifier", quickly)
    monkeypatch.setattr(module, "named_features", lambda name, weights: Pool())


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """Five clips of 10 frames, one in a subfolder, and one that is none."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for number in range(5):
        noise = torch.rand(1, 3, 10, 4, 6, generator=torch.Generator().manual_seed(number)) * 2 - 1
        clip = nn.functional.interpolate(noise, (10, 32, 48))[0]
        (folder / ("more" if number == 4 else ".") / f"{number}.mp4").write_bytes(encode_clip(clip, "mp4", 10))
    (folder / "broken.mp4").write_bytes(b"not a clip")
    return folder


def test_digits_in_motion_are_reference_features_and_judge() -> None:
    found = make_clip_evaluator(None, None, "digits", SHAPE, CPU, 100)
    assert found.reference.description == "scikit-learn's digits in motion (1797 clips)"
    assert found.floor is not None and found.floor > 0 and found.classifier is None
    assert found.frame_reference is not None and found.frame_features is not None and found.agreement is not None
    digits = MovingDigits(ClipFormat(12, 4))
    clips, motions = digits.clips(0, [Draw(sample) for sample in range(len(digits))])
    for features, reference in ((found.features, found.reference), (found.frame_features, found.frame_reference)):
        real = FeatureStatistics.of(torch.cat([features(part) for part in clips.split(256)])).gaussian()
        assert reference.statistics.fingerprint == features.fingerprint
        assert reference.statistics.distance(real) < 1e-3 * real.covariance.trace()
    directions = [DIRECTION_NAMES[place] for place in motions.directions[:50]]
    _, attributes = moving_digits.moving_digits_in(ClipFormat(12, 4))
    texts = [moving_caption_of(MovingDigit(*pair)) for pair in zip(attributes[:50], directions, strict=True)]
    assert found.agreement(clips[:50], texts)["agreement"].mean > 0.6


def test_larger_digits_can_be_asked_for() -> None:
    small, large = (make_clip_evaluator(None, None, name, (1, 4, 24, 24), CPU, 20) for name in ("digits", "digits:16"))
    assert small.reference.statistics.distance(large.reference.statistics) > 0
    assert large.agreement is not None and large.agreement.digit_size == 16  # type: ignore[attr-defined]


def test_a_folder_of_clips(clip_folder: Path) -> None:
    found = make_clip_evaluator("squeezenet", None, str(clip_folder), (3, 4, 16, 16), CPU, 10, fps=5)
    assert found.reference.description == "clips (5 clips)" and found.skips is not None and len(found.skips) == 1
    files = [*(clip_folder / f"{number}.mp4" for number in range(4)), clip_folder / "more" / "4.mp4"]
    clips = torch.stack([read_clip(file, ClipSettings(4, (16, 16), 5)) for file in files])
    assert found.frame_features is not None and found.frame_reference is not None and found.floor is None
    for features, reference in ((found.features, found.reference), (found.frame_features, found.frame_reference)):
        real = FeatureStatistics.of(features(clips)).gaussian()
        assert reference.statistics.distance(real) < 1e-6
    assert found.frame_reference.statistics.count == 20 and found.reference.statistics.count == 5


def test_saved_statistics_are_over_clips(clip_folder: Path, tmp_path: Path) -> None:
    first = make_clip_evaluator("squeezenet", None, str(clip_folder), (3, 4, 16, 16), CPU, 10)
    first.reference.statistics.save(tmp_path / "clips.npz")
    again = make_clip_evaluator("squeezenet", None, str(tmp_path / "clips.npz"), (3, 4, 16, 16), CPU, 10)
    assert again.reference.statistics.distance(first.reference.statistics) < 1e-9 and again.frame_reference is None


@pytest.mark.parametrize(
    ("features", "reference", "shape", "sentence"),
    [
        (None, "digits", (3, 4, 12, 12), "square and grey"),
        (None, "digits:large", SHAPE, "write digits:16"),
        (None, "digits:11", SHAPE, "half as many more"),
        ("digits", "nowhere", SHAPE, "--reference digits"),
        ("inception", "nowhere", SHAPE, "a folder of clips, or 'digits'"),
    ],
)
def test_refusals(features: str | None, reference: str, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_clip_evaluator(features, None, reference, shape, CPU, 10)


def test_folders_without_enough_clips_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make = partial(make_clip_evaluator, "squeezenet", None)
    with pytest.raises(FileNotFoundError, match="no clips under"):
        make(str(tmp_path / "empty"), (3, 4, 16, 16), CPU, 10)
    with pytest.raises(FileNotFoundError, match=r"0 clips that can be used.*6 clips skipped"):
        make(str(clip_folder), (3, 40, 16, 16), CPU, 10)
