"""scikit-learn's 1,797 real handwritten digits as tensors: images that need no download.

Shape legend: S side of the image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NATIVE_SIZE = 8
NUM_CLASSES = 10


def load_digit_images(size: int = NATIVE_SIZE) -> tuple[Tensor, Tensor]:
    """All digits: ``(x (1797, 1, S, S) float32 in [-1, 1], y (1797,) int64)``, bilinear above 8 pixels.

    Raises:
        ValueError: if the size is below 8.
    """
    from sklearn.datasets import load_digits

    if size < NATIVE_SIZE:
        raise ValueError(f"the digits have {NATIVE_SIZE} pixels a side: size is at least {NATIVE_SIZE}, got {size}")
    data = load_digits()
    x = torch.from_numpy(data.images).float().div(8).sub(1).unsqueeze(1)  # grey levels 0 to 16
    x = F.interpolate(x, (size, size), mode="bilinear") if size > NATIVE_SIZE else x
    return x, torch.from_numpy(data.target).long()
