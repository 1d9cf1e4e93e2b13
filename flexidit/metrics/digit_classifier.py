"""A small classifier trained on the spot: judge of generated digits where nothing may be downloaded.

Shape legend: N images, H W height and width in pixels, D features.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitClassifier(nn.Module):
    """Convolutional classifier of grey digits; its penultimate layer (D = 64) is a feature extractor.

    Distances in these features compare with one another only, and only for one seed and one training set.

    Args:
        num_classes: Number of classes.
        width: Channels of the last convolutions, and features D.
    """

    name = "digit classifier, penultimate layer (trained on the same digits)"

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _convolution(1, width // 2),
            _convolution(width // 2, width, stride=2),
            _convolution(width, width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, num_classes)

    @property
    def fingerprint(self) -> str:
        """Digest of the weights."""
        digest = hashlib.sha256()
        for name, value in self.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        return f"digit-classifier/{digest.hexdigest()[:12]}"

    def forward(self, pixels: Tensor) -> Tensor:
        """Same as :meth:`features`, so that the classifier itself is a feature extractor."""
        return self.features(pixels)

    def features(self, pixels: Tensor) -> Tensor:
        """(N, 1, H, W) in [-1, 1] -> (N, D)."""
        return self.trunk(pixels.float())

    def logits(self, pixels: Tensor) -> Tensor:
        """Class scores: (N, 1, H, W) in [-1, 1] -> (N, num_classes)."""
        return self.head(self.features(pixels))

    @torch.no_grad()
    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Share of images whose highest score is their label."""
        return float((self.logits(pixels).argmax(dim=1) == labels).double().mean())


def _convolution(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


def train_digit_classifier(
    x: Tensor,
    y: Tensor,
    seed: int = 0,
    *,
    num_epochs: int = 20,
    batch_size: int = 64,
    peak_lr: float = 3e-3,
    num_classes: int = 10,
) -> DigitClassifier:
    """Train on CPU: a pure function of its arguments, a few seconds for 1,400 digits of 8x8 pixels.

    The global random state is left as it was.

    Args:
        x: Pixels (N, 1, H, W) in [-1, 1].
        y: Labels (N,), from 0 on.
        seed: Decides initial weights and order.
        num_epochs: Passes over the data.
        batch_size: Images per step.
        peak_lr: Highest learning rate of a one-cycle schedule.
        num_classes: Number of labels that there are.

    Returns:
        The classifier, in evaluation mode, without gradients.

    Raises:
        ValueError: pixels and labels do not fit together.
    """
    if x.ndim != 4 or x.shape[1] != 1 or len(x) != len(y):
        raise ValueError(f"pixels (N, 1, H, W) and labels (N,) are needed, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.cpu(), y.cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier(num_classes).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=peak_lr, weight_decay=1e-2)
        num_steps = num_epochs * -(-len(x) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=num_steps)
        with torch.enable_grad():
            for _ in range(num_epochs):
                for rows in torch.randperm(len(x)).split(batch_size):
                    _train_step(classifier, optimizer, x[rows], y[rows])
                    schedule.step()
    return classifier.eval().requires_grad_(False)


def digit_features(size: int = 8, seed: int = 0) -> DigitClassifier:
    """A classifier trained, here and now, on all of scikit-learn's digits: a config can name it as an evaluator.

    Args:
        size: Height and width of the images that will be judged; the digits are enlarged to it, bilinear.
        seed: See :func:`train_digit_classifier`.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1  # grey levels 0 to 16
    x = F.interpolate(x, (size, size), mode="bilinear")
    return train_digit_classifier(x, torch.from_numpy(data.target).long(), seed)


def _train_step(classifier: DigitClassifier, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(classifier.logits(x), y, label_smoothing=0.05)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
