from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from flexidit import create_model
from flexidit.commands import evaluator as module
from flexidit.commands.evaluator import make_evaluator, sample_shape_of
from flexidit.images import read_pixels
from flexidit.latents import LatentCodec, PixelCodec
from flexidit.metrics.digit_classifier import train_digit_classifier
from flexidit.metrics.frechet import FeatureStatistics, Gaussian
from flexidit.skips import SkipReport

CPU = torch.device("cpu")
GREY = (1, 8, 8)


@pytest.fixture(autouse=True)
def _quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train_digit_classifier", partial(train_digit_classifier, num_epochs=1))


def test_digits_are_reference_features_and_classifier(tmp_path: Path) -> None:
    first = make_evaluator(None, None, "digits", GREY, CPU, 200)
    assert first.reference.description == "scikit-learn's digits (1797 samples)"
    assert first.classifier is not None and first.classifier(torch.zeros(2, *GREY)).shape == (2, 10)
    assert first.floor is not None and first.floor > 0
    fewer = make_evaluator("digits", None, "digits", GREY, CPU, 50)
    assert fewer.features.fingerprint == first.features.fingerprint
    assert fewer.floor is not None and fewer.floor > first.floor  # a finite number of samples alone is a distance


def test_saved_statistics_are_the_same_reference(tmp_path: Path) -> None:
    first = make_evaluator(None, None, "digits", GREY, CPU, 200)
    first.reference.statistics.save(tmp_path / "digits.npz")
    again = make_evaluator("digits", None, str(tmp_path / "digits.npz"), GREY, CPU, 200)
    assert again.reference.statistics.distance(first.reference.statistics) < 1e-9
    assert again.reference.description == "digits.npz (1797 samples)" and again.floor is None


def test_folders_are_cropped_and_broken_images_counted(image_folder: Path) -> None:
    (image_folder / "n00000000" / "00.jpg").write_bytes(b"not an image")
    skips = SkipReport()
    batches = list(module._folder_batches(image_folder, (3, 16, 16), skips))
    assert sum(len(batch["x"]) for batch in batches) == 11
    assert torch.equal(batches[0]["x"][0], read_pixels(image_folder / "n00000000" / "01.jpg", 16))
    assert skips.summary("image") == "1 image skipped: 00.jpg (not an image)"


def test_a_folder_with_real_features(image_folder: Path, test_data: Path) -> None:
    (weights,) = (test_data / "features").glob("squeezenet1_0_*.safetensors")
    evaluator = make_evaluator("squeezenet", weights, str(image_folder), (3, 32, 32), CPU, 10)
    assert evaluator.reference.description == "images (12 samples)"
    pixels = torch.stack([read_pixels(path, 32) for path in sorted(image_folder.rglob("*.jpg"))])
    statistics = FeatureStatistics.of(evaluator.features(pixels)).gaussian()
    assert evaluator.reference.statistics.distance(statistics) < 1e-3


def test_decoded_samples_have_the_codecs_shape(tiny_vae: Path) -> None:
    assert sample_shape_of(create_model("DiT-Tiny/2", input_size=(8, 4), in_channels=1), PixelCodec(1)) == (1, 8, 4)
    assert sample_shape_of(create_model("DiT-Tiny/2", input_size=8), LatentCodec(tiny_vae)) == (3, 32, 32)


def test_refusals(tmp_path: Path) -> None:
    Gaussian(torch.zeros(3), torch.eye(3)).save(tmp_path / "three.npz")
    (tmp_path / "empty").mkdir()
    cases = [
        (("vgg", None, "digits", GREY), "unknown features 'vgg'"),
        (("squeezenet", None, "digits", GREY), "needs --feature-weights"),
        ((None, None, "digits", (3, 8, 8)), "square and grey"),
        ((None, None, "digits", (1, 8, 4)), "square and grey"),
        (("digits", None, "nowhere", GREY), "no reference at 'nowhere'"),
        (("digits", None, "nowhere.npz", GREY), "no reference statistics at nowhere.npz"),
        (("digits", None, str(tmp_path / "three.npz"), GREY), "has 3 features and .* gives 64"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            make_evaluator(*arguments, CPU, 10)
    with pytest.raises(FileNotFoundError, match="no images under"):
        make_evaluator("digits", None, str(tmp_path / "empty"), GREY, CPU, 10)
