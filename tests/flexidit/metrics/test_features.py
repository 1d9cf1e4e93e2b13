"""Resizing against clean-fid, networks against their makers' figures, and refusals."""

import csv
import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import inception_pytorch
from cleanfid.resize import build_resizer
from PIL import Image
from torch import Tensor

from flexidit.metrics import features
from flexidit.metrics.features import (
    FeatureExtractor,
    InceptionFeatures,
    ResNet56Features,
    SqueezeNetFeatures,
    cifar_resnet,
    resize_clean,
    to_byte_levels,
)


def pixels(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("size", [32, 500])
def test_resizes_as_cleanfid_does(size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    theirs = torch.from_numpy(build_resizer("clean")(image)).permute(2, 0, 1)
    ours = resize_clean(to_byte_levels(pixels(image)[None]), 299)[0]
    assert ours.min() >= 0 and ours.max() <= 255
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


def test_byte_levels_are_those_of_a_saved_picture() -> None:
    levels = torch.arange(256.0)
    assert torch.equal(to_byte_levels(levels / 127.5 - 1), levels)
    assert torch.equal(to_byte_levels(torch.tensor([-3.0, 3.0])), torch.tensor([0.0, 255.0]))


def random_inception(path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(features._build_inception().state_dict(), path)
    return path


def test_inception_is_cleanfids_network_under_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_inception(tmp_path / "inception.pth")
    monkeypatch.setattr(
        inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: torch.load(weights, weights_only=True)
    )
    theirs = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False, normalize_input=False).eval()
    ours = InceptionFeatures(weights)
    x = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        resized = (resize_clean(to_byte_levels(x), 299) - 128) / 128
        torch.testing.assert_close(ours(x), theirs(resized)[0].flatten(1))
        assert ours.logits(x).shape == (1, 1008)


def test_missing_inception_weights_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"could not be downloaded \(no route to host\); fetch https"):
        InceptionFeatures()
    with pytest.raises(ValueError, match="no Inception weights at"):
        InceptionFeatures(tmp_path / "missing.pth")


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "other.th")
    with pytest.raises(ValueError, match="does not hold the weights of this network"):
        ResNet56Features(tmp_path / "other.th")


def test_code_in_a_weight_file_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Path("x")}, tmp_path / "code.th")
    with pytest.raises(Exception, match=r"[Ww]eights[_ ]only"):
        ResNet56Features(tmp_path / "code.th")


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_papers_size(depth: int, millions: float) -> None:
    """(He et al. 2016, table 6)."""
    count = sum(parameter.numel() for parameter in cifar_resnet(depth).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


def cifar_test_images(archive: Path, count: int) -> tuple[Tensor, Tensor]:
    """Every so manieth test image: (count, 3, 32, 32) and labels (count,)."""
    names: list[str] = []
    images: list[Tensor] = []
    with tarfile.open(archive) as tar:
        members = (m for m in tar if m.name.startswith("test/") and m.isfile())
        for member in itertools.islice(members, 0, None, 10000 // count):
            file = tar.extractfile(member)
            assert file is not None
            images.append(pixels(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))))
            names.append(member.name.split("/")[1])
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return torch.stack(images), torch.tensor([classes.index(name) for name in names])


def test_resnet56_reads_cifar(test_data: Path) -> None:
    archive, weights = test_data / "cifar10.tar.xz", test_data / "features" / "resnet56-4bfd9763.th"
    if not archive.is_file() or not weights.is_file():
        pytest.skip("CIFAR-10 or its ResNet-56 is not among the test data")
    network = ResNet56Features(weights)
    x, y = cifar_test_images(archive, 400)
    with torch.no_grad():
        accuracy = (network.logits(x).argmax(dim=1) == y).double().mean()
    assert isinstance(network, FeatureExtractor)
    assert network(x[:2]).shape == (2, 64)
    assert len(x) == 400 and 0.77 < accuracy < 0.90  # 83 % on all 10,000; one standard error is 1.9 %


def test_squeezenet_reads_imagenet(test_data: Path) -> None:
    images = test_data / "imagenet_samples"
    weights = test_data / "features" / "squeezenet1_0_torchvision_layout_bgr_caffe.safetensors"
    if not images.is_dir() or not weights.is_file():
        pytest.skip("ImageNet samples or SqueezeNet are not among the test data")
    network = SqueezeNetFeatures(weights)
    with (images / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))[::3]
    hits = []
    for row in rows:
        image = Image.open(images / row["file"]).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        x = pixels(np.asarray(image.crop((left, top, left + side, top + side))))[None]
        with torch.no_grad():
            hits.append(int(network.logits(x).argmax()) == int(row["class_index"]))
    assert network(x).shape == (1, 512)
    assert sum(hits) / len(hits) > 0.4  # 65 % on all 100


def test_grey_images_are_shown_as_three_equal_channels(test_data: Path) -> None:
    weights = test_data / "features" / "resnet56-4bfd9763.th"
    if not weights.is_file():
        pytest.skip("the CIFAR-10 ResNet-56 is not among the test data")
    network = ResNet56Features(weights)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(network(x), network(x.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"\(N, 1 or 3, H, W\) are needed, got \(2, 4, 8, 8\)"):
        network(torch.zeros(2, 4, 8, 8))
