"""Feature extractors: pixels in, vectors out, and which network and weights they come from.

Shape legend: N images, C channels, H W height and width in pixels, D features.

Every extractor takes pixels in [-1, 1]. Those for photographs first round to the 256 levels that a saved picture
has, then resize by :func:`resize_clean`; the Frechet distance moves by more than most methods do if either is done
otherwise (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexidit.metrics.digit_classifier import DigitClassifier, train_digit_classifier

__all__ = [
    "DigitClassifier",
    "FeatureExtractor",
    "InceptionFeatures",
    "ResNet56Features",
    "SqueezeNetFeatures",
    "resize_clean",
    "to_byte_levels",
    "train_digit_classifier",
]

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)


@runtime_checkable
class FeatureExtractor(Protocol):
    """Anything that maps pixels in [-1, 1] to features and says what it is."""

    @property
    def name(self) -> str:
        """Network, layer and training data, for the record of an evaluation."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the features of some image would: statistics are comparable only if it is equal."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, D)."""


def to_byte_levels(pixels: Tensor) -> Tensor:
    """[-1, 1] to the levels 0, 1, ..., 255 of a saved picture, as float32: (N, C, H, W) -> (N, C, H, W).

    Example:
        >>> to_byte_levels(torch.tensor([-1.5, -1.0, 0.0, 1.0])).tolist()
        [0.0, 0.0, 128.0, 255.0]
    """
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0.0, 255.0)


def resize_clean(levels: Tensor, size: int) -> Tensor:
    """Antialiased bicubic resize of levels 0 to 255 to a square, without rounding after: clean-fid's rule.

    Args:
        levels: (N, C, H, W) in [0, 255].
        size: New height and width.

    Returns:
        (N, C, size, size), clipped to [0, 255], where the bicubic kernel overshoots.
    """
    if levels.shape[-2:] == (size, size):
        return levels
    resized = F.interpolate(levels, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0.0, 255.0)


def as_rgb(pixels: Tensor) -> Tensor:
    """Grey images as three equal channels: (N, 1 or 3, H, W) -> (N, 3, H, W)."""
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"images of shape (N, 1 or 3, H, W) are needed, got {tuple(pixels.shape)}")
    return pixels.expand(-1, 3, -1, -1)


class InceptionFeatures(nn.Module):
    """Pool features (D = 2048) of the Inception-v3 that the FID is defined on; resized to 299 as clean-fid does.

    The network is clean-fid's PyTorch port with the 2015 TensorFlow weights that pytorch-fid published. They are read
    as a plain state dict; the TorchScript archive of the same weights is a program and is not opened.

    Args:
        weights: ``pt_inception-2015-12-05-6726825d.pth``; None downloads it once, checked against the hash in its name.

    Raises:
        ValueError: the weights cannot be had, or are not these.
    """

    name = "Inception-v3 pool features (2015 TensorFlow weights, clean resize)"

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        state = _download_inception() if weights is None else _load_pth(weights, "Inception")
        self.network: Any = _build_inception()
        _load_strict(self.network, state, weights or INCEPTION_URL)
        self.fc: Any = self.network.fc
        self.network.fc = nn.Identity()  # the network's own forward then ends at the pool
        self.fingerprint = f"inception-v3-fid/clean-299/{_digest(state)}"
        _freeze(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) in [-1, 1] -> (N, 2048)."""
        levels = resize_clean(to_byte_levels(as_rgb(pixels)), 299)
        return self.network((levels - 128.0) / 128.0)

    def logits(self, pixels: Tensor) -> Tensor:
        """Scores of the 2015 network's 1008 classes without bias, as the Inception Score takes them."""
        return F.linear(self(pixels), self.fc.weight)


class SqueezeNetFeatures(nn.Module):
    """Mean-pooled last features (D = 512) of SqueezeNet 1.0 trained on ImageNet, at 227 pixels.

    For places where Inception's weights cannot be had. Its numbers compare with one another only, never with a FID.

    Args:
        weights: safetensors file in torchvision's layout, trained on BGR levels minus (104, 117, 123).

    Raises:
        ValueError: the file is missing or holds another network.
    """

    name = "SqueezeNet 1.0 last features, pooled (ImageNet, clean resize)"

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__()
        from torchvision.models import squeezenet1_0

        state = _load_safetensors(weights)
        self.network = squeezenet1_0(weights=None)
        _load_strict(self.network, state, weights)
        self.register_buffer("bgr_mean", torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1), persistent=False)
        self.fingerprint = f"squeezenet1.0-bgr/clean-227/{_digest(state)}"
        _freeze(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) in [-1, 1] -> (N, 512)."""
        return self.network.features(self._input(pixels)).mean(dim=(2, 3))

    def logits(self, pixels: Tensor) -> Tensor:
        """ImageNet class scores: (N, 1 or 3, H, W) in [-1, 1] -> (N, 1000)."""
        return self.network(self._input(pixels))

    def _input(self, pixels: Tensor) -> Tensor:
        levels = resize_clean(to_byte_levels(as_rgb(pixels)), 227)
        return levels.flip(1) - self.get_buffer("bgr_mean")


class ResNet56Features(nn.Module):
    """Pooled features (D = 64) of a CIFAR-10 ResNet-56 (He et al. 2016, section 4.2), at 32 pixels.

    Args:
        weights: ``.th`` file with a ``state_dict`` of akamaster's pytorch_resnet_cifar10, keys with or without
            ``module.``.

    Raises:
        ValueError: the file is missing or holds another network.
    """

    name = "ResNet-56 pool features (CIFAR-10)"

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__()
        checkpoint = _load_pth(weights, "ResNet-56")
        state = checkpoint.get("state_dict", checkpoint)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        self.network = cifar_resnet(56)
        _load_strict(self.network, state, weights)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.fingerprint = f"resnet56-cifar10/clean-32/{_digest(state)}"
        _freeze(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) in [-1, 1] -> (N, 64)."""
        levels = resize_clean(to_byte_levels(as_rgb(pixels)), 32)
        x = (levels / 255.0 - self.get_buffer("mean")) / self.get_buffer("std")
        return self.network[:-1](x)

    def logits(self, pixels: Tensor) -> Tensor:
        """CIFAR-10 class scores, classes in alphabetical order: (N, 1 or 3, H, W) in [-1, 1] -> (N, 10)."""
        return self.network[-1](self(pixels))


class _CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        half = self.new_channels // 2
        shortcut = F.pad(shortcut, (0, 0, 0, 0, half, self.new_channels - half))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


def cifar_resnet(depth: int, num_classes: int = 10) -> nn.Sequential:
    """ResNet of ``6 n + 2`` layers for 32-pixel images: stages of 16, 32 and 64 channels; the last module is linear."""
    if (depth - 2) % 6:
        raise ValueError(f"a CIFAR ResNet has 6 n + 2 layers (20, 32, 44, 56, ...), got {depth}")
    num_blocks = (depth - 2) // 6

    def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        first = _CifarBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(_CifarBlock(channels, channels, 1) for _ in range(num_blocks - 1)))

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(16),
            relu=nn.ReLU(),
            layer1=stage(16, 16, 1),
            layer2=stage(16, 32, 2),
            layer3=stage(32, 64, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(64, num_classes),
        )
    )


def _freeze(module: nn.Module) -> None:
    module.requires_grad_(False).eval()


def _load_strict(network: nn.Module, state: dict[str, Tensor], source: object) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{source} does not hold the weights of this network: {reason}") from error


def _load_pth(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"no {what} weights at {path}; give the path of a downloaded file")
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"no SqueezeNet weights at {path}; give the path of a downloaded file")
    return load_file(path)


def _download_inception() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the Inception weights could not be downloaded ({error}); "
            f"fetch {INCEPTION_URL} elsewhere and give its path"
        ) from error


def _build_inception() -> nn.Module:
    """torchvision's Inception-v3 with clean-fid's patched blocks, random weights, keys as pytorch-fid's file has them.

    clean-fid has this as a function, but one that downloads the weights on the way.
    """
    from cleanfid import inception_pytorch as blocks
    from torchvision.models import Inception3

    network = Inception3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    network.Mixed_5b = blocks.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = blocks.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = blocks.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = blocks.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = blocks.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = blocks.FIDInceptionE_1(1280)
    network.Mixed_7c = blocks.FIDInceptionE_2(2048)
    return network


def _digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
