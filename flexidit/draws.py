"""Random draws of the data side, as pure functions of (seed, epoch, sample).

A counter-based generator (Philox) is keyed instead of advanced: what a sample receives in an epoch does not depend
on the order of reading, on the worker that read it, on the rank, or on where a run was interrupted.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_FLIP, _NOISE, _CHOICE, _UNIFORM, _START = range(5)  # independent streams of one sample


class Draw(NamedTuple):
    """One sample of one epoch: what a sampler yields and a data set is indexed with.

    The epoch travels with the index because a worker process holds its own copy of the data set, and would not
    learn about a new epoch otherwise.
    """

    sample: int
    epoch: int = 0

    @classmethod
    def of(cls, key: "int | Draw") -> "Draw":
        """A plain index means epoch 0."""
        return key if isinstance(key, Draw) else cls(int(key))


def _generator(seed: int, draw: Draw, stream: int) -> np.random.Generator:
    # the low words of the counter advance with use; stream and index sit above them, so streams never meet
    return np.random.Generator(np.random.Philox(key=[seed, draw.epoch], counter=[0, 0, stream, draw.sample]))


def draw_flip(seed: int, draw: Draw) -> bool:
    """Whether this sample is mirrored in this epoch: a fair coin."""
    return bool(_generator(seed, draw, _FLIP).random() < 0.5)


def draw_noise(seed: int, draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise for this sample in this epoch, float32, of the given shape."""
    return torch.from_numpy(_generator(seed, draw, _NOISE).standard_normal(shape, dtype=np.float32))


def draw_choice(seed: int, draw: Draw, count: int) -> int:
    """Which of ``count`` things (captions of an image) this sample uses in this epoch: each is as likely."""
    return int(_generator(seed, draw, _CHOICE).integers(count))


def draw_uniform(seed: int, draw: Draw, count: int) -> "np.ndarray[Any, Any]":
    """So many numbers from [0, 1) for this sample in this epoch, float64; fewer are the first ones of more."""
    return _generator(seed, draw, _UNIFORM).random(count)


def draw_start(seed: int, draw: Draw) -> float:
    """Where the window of this sample (a video) lies in this epoch: uniform in [0, 1), from the first to the last."""
    return float(_generator(seed, draw, _START).random())
