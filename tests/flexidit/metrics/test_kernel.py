"""KID against torchmetrics and clean-fid, and what an unbiased estimator must do."""

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from torchmetrics.image.kid import poly_mmd

from flexidit.metrics.kernel import kernel_distance, polynomial_mmd


def draw(count: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=generator, dtype=torch.float64) + shift


def test_agrees_with_torchmetrics() -> None:
    x, y = draw(40), draw(40, 0.3, seed=1)
    assert float(polynomial_mmd(x, y)) == pytest.approx(float(poly_mmd(x, y)), rel=1e-10)


def test_agrees_with_cleanfid_where_the_subset_is_everything() -> None:
    x, y = draw(50), draw(50, 0.3, seed=1)
    np.random.seed(0)
    theirs = cleanfid.kernel_distance(x.numpy(), y.numpy(), num_subsets=1)
    assert kernel_distance(x, y, num_subsets=1) == pytest.approx(theirs, rel=1e-8)


def test_unbiased() -> None:
    values = torch.stack([polynomial_mmd(draw(10, seed=2 * i), draw(15, seed=2 * i + 1)) for i in range(400)])
    standard_error = values.std() / 20
    assert abs(values.mean()) < 3 * standard_error
    assert (values < 0).any()


def test_subsets_are_a_function_of_the_seed() -> None:
    x, y = draw(60), draw(60, 0.5, seed=1)
    first = kernel_distance(x, y, num_subsets=5, max_subset_size=20, seed=3)
    assert first == kernel_distance(x, y, num_subsets=5, max_subset_size=20, seed=3)
    assert first != kernel_distance(x, y, num_subsets=5, max_subset_size=20, seed=4)
    assert first > 0


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="two samples"):
        polynomial_mmd(draw(1), draw(5))
