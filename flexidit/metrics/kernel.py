"""Kernel distance between two sets of features (KID, Binkowski et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor


def polynomial_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared MMD with the kernel ``(x.y / D + 1)^3``: (N, D), (M, D) -> scalar, float64.

    Unbiased: zero on average for equal distributions, hence also a little negative.
    """
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"the unbiased estimator needs two samples or more of each set, got {n} and {m}")
    k_xx, k_yy, k_xy = (_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    within_x = (k_xx.sum() - k_xx.trace()) / (n * (n - 1))
    within_y = (k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return within_x + within_y - 2 * k_xy.mean()


def kernel_distance(
    x: Tensor, y: Tensor, *, num_subsets: int = 100, max_subset_size: int = 1000, seed: int = 0
) -> float:
    """KID as published: :func:`polynomial_mmd` averaged over random subsets: (N, D), (M, D) -> number.

    Unlike the Frechet distance it has no bias at small sample counts.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(len(x), len(y), max_subset_size)
    values = []
    for _ in range(num_subsets):
        rows = [torch.randperm(len(z), generator=generator)[:size].to(z.device) for z in (x, y)]
        values.append(polynomial_mmd(x[rows[0]], y[rows[1]]))
    return float(torch.stack(values).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT / x.shape[1] + 1) ** 3
