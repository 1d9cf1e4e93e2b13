"""Stroke weight, slant and size of handwritten digits, measured: true captions, and how far samples keep to theirs.

An adjective compares with digits of the same class, as in speech: a seven naturally has its ink at the top right, and
is said to lean only if it leans more than sevens do. The typical values are the medians of scikit-learn's digits. All
those digits are scaled to the full height of the image, so the size that differs is the width.

Shape legend: N images, H W height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flexidit.digit_captions import ATTRIBUTES, DigitAttributes, captions_of, parse_caption
from flexidit.digit_images import NATIVE_SIZE, load_digit_images
from flexidit.patch_embed import resize_matrix_1d

TYPICAL = (
    (4.698, -0.029, 1.434),
    (5.765, -0.012, 0.979),
    (4.884, -0.135, 1.167),
    (4.793, -0.078, 1.179),
    (5.659, -0.002, 1.298),
    (4.838, -0.020, 1.235),
    (5.302, -0.206, 1.260),
    (5.277, 0.130, 1.145),
    (5.472, -0.005, 1.147),
    (4.895, -0.098, 1.289),
)
"""Median (weight, slant, size) of each class, over all 1,797 digits."""

FAINT = 1 / 8
"""Of full ink: as much is taken off everywhere, since traces of noise far from the middle would count as width."""

NAMED_QUANTILE, CONFIRMED_QUANTILE = 0.65, 0.50
UPRIGHT_NAMED_QUANTILE, UPRIGHT_CONFIRMED_QUANTILE = 0.25, 0.40


class Limits(NamedTuple):
    """Deviations from the typical digit, as quantiles of their absolute values over all 1,797 digits."""

    named: float
    """A caption says so from here on: at :data:`NAMED_QUANTILE`."""
    confirmed: float
    """A sample is believed from here on: at :data:`CONFIRMED_QUANTILE`, so that a caption is true with a margin."""


LIMITS = {"weight": Limits(0.126, 0.092), "slant": Limits(0.073, 0.052), "size": Limits(0.077, 0.055)}
UPRIGHT = Limits(0.023, 0.040)
"""Of a small slant, up to here: at :data:`UPRIGHT_NAMED_QUANTILE` and :data:`UPRIGHT_CONFIRMED_QUANTILE`."""


@dataclass(frozen=True)
class DigitMeasures:
    """Of N images, in units of a pixel of the 8x8 digits; nan for an image with ink in fewer than two rows."""

    weight: Tensor
    """(N,) ink per extent: the amount of ink over the sum of its standard deviations across and along.

    Among digits of one class the length of the strokes goes with the extent, so this goes with their thickness. It is
    a ratio of sums over the whole image: no threshold, no skeleton, which 8x8 grey levels do not carry. And it hardly
    depends on the size (correlation within a class -0.05, where ink over outline has -0.3).
    """
    slant: Tensor
    """(N,) tangent of the angle to the vertical, positive to the right: the shear in the second moments of the ink."""
    size: Tensor
    """(N,) standard deviation of the ink across, after the shear is undone, so that leaning does not widen."""


def measure(pixels: Tensor) -> DigitMeasures:
    """Weight, slant and size: (N, 1, H, W) in [-1, 1] -> three (N,), float64 on CPU.

    Images above 8x8 are first brought back to it by the least-squares inverse of the bilinear enlargement: enlarged
    digits measure exactly as their originals.

    Raises:
        ValueError: for another shape, or images below 8x8.
    """
    ink = _native_ink(pixels)
    place = torch.arange(NATIVE_SIZE, dtype=ink.dtype)
    mass = ink.sum((1, 2))  # (N,)
    dy = place - (ink.sum(2) * place).sum(1, keepdim=True) / mass[:, None]  # (N, 8)
    dx = place - (ink.sum(1) * place).sum(1, keepdim=True) / mass[:, None]  # (N, 8)
    var_y = (ink.sum(2) * dy.square()).sum(1) / mass
    var_x = (ink.sum(1) * dx.square()).sum(1) / mass
    cov = torch.einsum("nhw,nh,nw->n", ink, dy, dx) / mass
    slant = -cov / var_y  # y points down
    across = (var_x - slant.square() * var_y + 1 / 12).sqrt()  # a pixel is a square, not a point
    along = (var_y + 1 / 12).sqrt()
    return DigitMeasures(weight=mass / (across + along), slant=slant, size=across)


def deviations(pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """How far images are from the typical digit of the class that they are meant to show.

    Args:
        pixels: (N, 1, H, W) in [-1, 1].
        labels: (N,) 0 to 9.

    Returns:
        Attribute -> (N,): for weight and size relative to the typical value, for slant a difference of tangents.
    """
    measures = measure(pixels)
    weight, slant, size = torch.tensor(TYPICAL, dtype=torch.float64)[labels.cpu()].unbind(1)
    return {
        "weight": measures.weight / weight - 1,
        "slant": measures.slant - slant,
        "size": measures.size / size - 1,
    }


def attributes_of(pixels: Tensor, labels: Tensor) -> list[DigitAttributes]:
    """What a true caption names: (N, 1, H, W) in [-1, 1] and (N,) labels -> N descriptions."""
    values = {name: _named_values(name, deviation) for name, deviation in deviations(pixels, labels).items()}
    columns = zip(labels.tolist(), *(values[name] for name in ATTRIBUTES), strict=True)
    return [DigitAttributes(*column) for column in columns]


@dataclass(frozen=True)
class Count:
    """Statements that captions make about one attribute, and how many of them were confirmed."""

    confirmed: int = 0
    named: int = 0

    @property
    def share(self) -> float:
        """Of the statements, those confirmed; nan without any."""
        return self.confirmed / self.named if self.named else math.nan

    def __add__(self, other: Count) -> Count:
        return Count(self.confirmed + other.confirmed, self.named + other.named)


@dataclass(frozen=True)
class Agreement:
    """How far images keep to their captions. Agreements add up, over batches and ranks."""

    counts: Mapping[str, Count]
    """For "class", "weight", "slant" and "size"."""

    @property
    def overall(self) -> float:
        """Share of all statements that were confirmed, each counting once."""
        return sum(self.counts.values(), Count()).share

    @property
    def shares(self) -> dict[str, float]:
        """For each attribute, the share of its statements that were confirmed."""
        return {name: count.share for name, count in self.counts.items()}

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement({name: count + other.counts[name] for name, count in self.counts.items()})


def agreement(pixels: Tensor, captions: Sequence[str], classify: Callable[[Tensor], Tensor]) -> Agreement:
    """Share of what captions say that the images show.

    The class is confirmed by a classifier. An attribute is confirmed by measuring, against the typical digit of the
    class that the *caption* names, beyond a limit that is laxer than the one for naming it in a caption. True captions
    of real digits therefore score 1 by construction, apart from the classifier's errors; the same captions shuffled
    among the digits score 0.22 (class 0.09, attributes 0.3 to 0.4). The limits exclude one another: no image is both
    left and upright. A blank image confirms no attribute.

    Args:
        pixels: (N, 1, H, W) in [-1, 1].
        captions: N texts that :func:`~flexidit.digit_captions.parse_caption` understands.
        classify: Pixels -> class scores (N, 10), such as ``DigitClassifier.logits``.

    Raises:
        ValueError: unequal numbers of images and captions, or a caption that cannot be understood.
    """
    if len(pixels) != len(captions):
        raise ValueError(f"every image needs a caption, got {len(pixels)} images and {len(captions)} captions")
    wanted = [parse_caption(caption) for caption in captions]
    labels = torch.tensor([digit.label for digit in wanted], dtype=torch.int64)
    with torch.no_grad():
        correct = classify(pixels).argmax(1).cpu() == labels
    counts = {"class": Count(int(correct.sum()), len(wanted))}
    for name, deviation in deviations(pixels, labels).items():
        counts[name] = _count_confirmed(name, deviation, [digit.named.get(name) for digit in wanted])
    return Agreement(counts)


def prompts(count: int, seed: int = 0) -> list[str]:
    """Captions with the shares that real digits have: those of digits drawn without repetition while there are any.

    A pure function of its arguments; fewer prompts are the first ones of more.
    """
    generator = torch.Generator().manual_seed(seed)
    return [caption for caption, _ in zip(_shuffled_captions(generator), range(count), strict=False)]


@lru_cache(maxsize=1)
def real_captions() -> tuple[tuple[str, ...], ...]:
    """The true captions of each of the 1,797 digits, in the order of the data set."""
    return tuple(map(captions_of, attributes_of(*load_digit_images())))


def _shuffled_captions(generator: torch.Generator) -> Iterator[str]:
    captions = real_captions()
    while True:
        for place in torch.randperm(len(captions), generator=generator).tolist():
            phrasing = int(torch.randint(len(captions[place]), (), generator=generator))
            yield captions[place][phrasing]


def _native_ink(pixels: Tensor) -> Tensor:
    """Amount of ink, 0 to 1, at the resolution of the real digits: (N, 1, H, W) -> (N, 8, 8)."""
    if pixels.ndim != 4 or pixels.shape[1] != 1 or min(pixels.shape[2:]) < NATIVE_SIZE:
        raise ValueError(f"digits are images (N, 1, H, W) of at least 8x8 pixels, got {tuple(pixels.shape)}")
    ink = ((pixels.detach().cpu().double()[:, 0] + 1) / 2).clamp(0, 1)
    if ink.shape[1:] != (NATIVE_SIZE, NATIVE_SIZE):
        ink = _shrink_matrix(ink.shape[1]) @ ink @ _shrink_matrix(ink.shape[2]).T
    return ((ink - FAINT) / (1 - FAINT)).clamp(0, 1)


@lru_cache(maxsize=8)
def _shrink_matrix(size: int) -> Tensor:
    """(8, size), the pseudo-inverse of the bilinear enlargement from 8 samples."""
    return torch.linalg.pinv(resize_matrix_1d(NATIVE_SIZE, size))


def _holds(name: str, value: str, deviation: Tensor, confirm: bool) -> Tensor:
    """Where a value of an attribute may be named, or, with ``confirm``, be believed: (N,) -> (N,) bool."""
    if value == "upright":
        return deviation.abs() <= UPRIGHT[confirm]
    negative = value == ATTRIBUTES[name][0]
    return (-deviation if negative else deviation) >= LIMITS[name][confirm]


def _named_values(name: str, deviation: Tensor) -> list[str | None]:
    values: list[str | None] = [None] * len(deviation)
    for value in ATTRIBUTES[name]:
        for place in _holds(name, value, deviation, confirm=False).nonzero().flatten().tolist():
            values[place] = value
    return values


def _count_confirmed(name: str, deviation: Tensor, wanted: Sequence[str | None]) -> Count:
    total = Count()
    for value in ATTRIBUTES[name]:
        asked = torch.tensor([word == value for word in wanted], dtype=torch.bool)
        total += Count(int((_holds(name, value, deviation, confirm=True) & asked).sum()), int(asked.sum()))
    return total
