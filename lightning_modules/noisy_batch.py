"""What a loss asks the model about.

Shape legend: N samples of one process, C H W channels, height and width of what the model sees; clips have frames too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class NoisyBatch:
    """A batch as the model is asked about it."""

    x_start: Tensor
    """(N, C, H, W), clean."""
    noise: Tensor
    """(N, C, H, W)."""
    x_t: Tensor
    """(N, C, H, W), both mixed."""
    t: Tensor
    """(N,) step indices of the process."""
    times: Tensor
    """(N,) what the model is told of them."""
    y: Any
    """N labels or captions, some of them dropped."""
