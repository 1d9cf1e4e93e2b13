"""Precision and recall on sets whose answer is plain, and against a loop over pairs."""

import pytest
import torch
from torch import Tensor

from flexidit.metrics.precision_recall import precision_recall


def draw(count: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) + shift


def by_loops(real: Tensor, generated: Tensor, k: int) -> tuple[float, float]:
    def covered(points: Tensor, centres: Tensor) -> float:
        radii = [sorted(float((c - other).norm()) for other in centres)[k] for c in centres]
        hits = [any(float((p - c).norm()) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    return covered(generated, real), covered(real, generated)


def test_agrees_with_loops() -> None:
    real, generated = draw(30), draw(25, 0.7, seed=1)
    for k in (1, 3):
        result = precision_recall(real, generated, num_neighbours=k, chunk_size=7)
        assert tuple(result) == pytest.approx(by_loops(real.double(), generated.double(), k))


def test_equal_sets_are_perfect_and_distant_ones_nothing() -> None:
    assert precision_recall(draw(50), draw(50)) == (1.0, 1.0)
    assert precision_recall(draw(50), draw(50, 100.0)) == (0.0, 0.0)


def test_a_dropped_mode_costs_recall_only() -> None:
    modes = torch.cat([draw(50), draw(50, 50.0, seed=1)])
    result = precision_recall(modes, draw(50))
    assert result.precision == 1.0
    assert result.recall == pytest.approx(0.5)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 neighbours need more than 3 samples of each set, got 3 real"):
        precision_recall(draw(3), draw(9))
