"""Fidelity and coverage apart: improved precision and recall (Kynkaanniemi et al. 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PrecisionRecall(NamedTuple):
    """Both between 0 and 1."""

    precision: float
    """Share of generated samples that lie on the manifold of the real ones: fidelity."""
    recall: float
    """Share of real samples that lie on the manifold of the generated ones: coverage."""


def precision_recall(
    real: Tensor, generated: Tensor, *, num_neighbours: int = 3, chunk_size: int = 1024
) -> PrecisionRecall:
    """Precision and recall, each set's manifold being the balls that reach each sample's k-th neighbour.

    Args:
        real: Features (N, D).
        generated: Features (M, D).
        num_neighbours: k; 3 in the paper.
        chunk_size: Rows whose distances are held at once.

    Raises:
        ValueError: a set has no k-th neighbour.
    """
    if min(len(real), len(generated)) <= num_neighbours:
        raise ValueError(
            f"{num_neighbours} neighbours need more than {num_neighbours} samples of each set, "
            f"got {len(real)} real and {len(generated)} generated"
        )
    real, generated = real.double(), generated.double()
    return PrecisionRecall(
        precision=_share_inside(generated, real, _radii(real, num_neighbours, chunk_size), chunk_size),
        recall=_share_inside(real, generated, _radii(generated, num_neighbours, chunk_size), chunk_size),
    )


def _radii(points: Tensor, num_neighbours: int, chunk_size: int) -> Tensor:
    """Distance of each point to its k-th neighbour, itself not counted: (N, D) -> (N,)."""
    chunks = points.split(chunk_size)
    return torch.cat([_distances(chunk, points).kthvalue(num_neighbours + 1, dim=1).values for chunk in chunks])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, chunk_size: int) -> float:
    inside = [(_distances(chunk, centres) <= radii).any(dim=1) for chunk in points.split(chunk_size)]
    return float(torch.cat(inside).double().mean())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # The matrix product is two orders faster; its rounding near zero needs float64, which the caller provides.
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")
