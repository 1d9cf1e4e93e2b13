"""Which gradient norms are unusual, by those of the steps before."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median


class GradientHistory:
    """The last gradient norms of each patch size, whose median says what is usual.

    Weak and powerful sizes have gradients of different sizes, so each has its own. The median of a window is not moved
    by the spikes themselves, and follows the level of a run within half a window.

    Args:
        factor: a norm of more than so many medians is a spike.
        window: norms that are remembered; a fifth of them must be there before one is judged.
    """

    def __init__(self, factor: float = 5.0, window: int = 100) -> None:
        self.factor, self.window = factor, window
        self._norms: dict[str, deque[float]] = {}

    def add(self, patch_size: str, norm: float) -> float | None:
        """Remember a norm; how many medians it is, if that makes it a spike."""
        norms = self._norms.setdefault(patch_size, deque(maxlen=self.window))
        usual = median(norms) if len(norms) >= max(1, self.window // 5) else 0.0
        norms.append(norm)
        return norm / usual if usual and norm > self.factor * usual else None

    def state_dict(self) -> dict[str, list[float]]:
        """Plain values."""
        return {patch_size: list(norms) for patch_size, norms in self._norms.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Take over what :meth:`state_dict` gave, as far as the window reaches."""
        self._norms = {patch_size: deque(norms, maxlen=self.window) for patch_size, norms in state.items()}
