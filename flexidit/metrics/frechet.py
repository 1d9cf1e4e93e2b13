"""Frechet distance between Gaussians, and the streaming statistics it needs.

Shape legend: N samples, D features. Everything is float64: the distance is a small difference of large traces.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    Array = Tensor | np.ndarray[Any, Any]


def frechet_distance(mu1: Array, cov1: Array, mu2: Array, cov2: Array) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: ``|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``.

    (Heusel et al. 2017, eq. 6). ``tr (C1 C2)^(1/2)`` is the nuclear norm of ``C1^(1/2) C2^(1/2)``, with symmetric
    roots from eigenvalues. A general matrix root (``scipy.linalg.sqrtm``) turns complex or fails where there are fewer
    samples than features, which is usual in a quick evaluation; this form does not.

    Args:
        mu1, mu2: Means (D,).
        cov1, cov2: Covariances (D, D).

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.

    Example:
        >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.tensor([3.0, 4.0]), 4 * torch.eye(2))
        27.0
    """
    m1, c1, m2, c2 = (_float64(value) for value in (mu1, cov1, mu2, cov2))
    num_features = m1.numel()
    if m1.shape != m2.shape or any(c.shape != (num_features, num_features) for c in (c1, c2)):
        shapes = [tuple(value.shape) for value in (m1, c1, m2, c2)]
        raise ValueError(f"means (D,) and covariances (D, D) of the same features are needed, got shapes {shapes}")
    if not all(value.isfinite().all() for value in (m1, c1, m2, c2)):
        raise ValueError("the statistics hold a NaN or an infinity; look for it in the samples or in their features")
    cross = torch.linalg.svdvals(symmetric_sqrt(c1) @ symmetric_sqrt(c2)).sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2.0 * cross
    return max(float(distance), 0.0)


def symmetric_sqrt(matrix: Tensor) -> Tensor:
    """Positive semi-definite root of a positive semi-definite matrix: (D, D) -> (D, D)."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    # Rounding leaves zero eigenvalues at +-eps * D * largest, whose root (1e-8) would be far larger than they are.
    floor = torch.finfo(matrix.dtype).eps * matrix.shape[0] * values.abs().amax()
    roots = torch.where(values > floor, values, 0.0).sqrt()
    return (vectors * roots) @ vectors.mT


@dataclass(frozen=True)
class Gaussian:
    """What a set of features comes down to; the reference of an evaluation is one of these."""

    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64, divided by N - 1 as in numpy's ``cov``, clean-fid and torchmetrics."""
    count: int | None = None
    """Number of samples N behind it; None where a file of others does not say."""
    fingerprint: str | None = None
    """Of the feature extractor; None where a file of others does not say."""

    def distance(self, other: Gaussian) -> float:
        """Frechet distance to ``other``."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` with ``mu`` and ``sigma``, as clean-fid and ADM have them, and what else is known."""
        import numpy as np

        extra = {"count": self.count, "fingerprint": self.fingerprint}
        known = {name: np.asarray(value) for name, value in extra.items() if value is not None}
        np.savez(path, mu=self.mean.cpu().numpy(), sigma=self.covariance.cpu().numpy(), **known)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gaussian:
        """Read ``mu`` and ``sigma`` of an ``.npz`` written here, by clean-fid, by ADM or by pytorch-fid.

        Raises:
            ValueError: the file is missing or has no such arrays.
        """
        import numpy as np

        if not Path(path).is_file():
            raise ValueError(f"no reference statistics at {path}; give an .npz with the arrays 'mu' and 'sigma'")
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                raise ValueError(f"{path} holds {sorted(file.files)}; reference statistics are 'mu' and 'sigma'")
            mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file.files else None
            fingerprint = str(file["fingerprint"]) if "fingerprint" in file.files else None
            return cls(mean, covariance, count, fingerprint)


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, on one rank or on many.

    Batches are merged by the pairwise update of Chan et al. (1983): centred sums, no cancellation. Updates stay on
    the features' device and never wait for it.

    Example:
        >>> statistics = FeatureStatistics()
        >>> for batch in torch.arange(12.0).view(6, 2).split(4):
        ...     statistics.update(batch)
        >>> gaussian = statistics.gaussian()
        >>> gaussian.count, gaussian.mean.tolist(), gaussian.covariance.tolist()
        (6, [5.0, 6.0], [[14.0, 14.0], [14.0, 14.0]])
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None  # (D,)
        self._scatter: Tensor | None = None  # (D, D), sum of centred outer products

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of one batch (N, D)."""
        statistics = cls()
        statistics.update(features)
        return statistics

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Take in features (N, D); N may be zero.

        Raises:
            ValueError: not two-dimensional, or another D than before.
        """
        if features.ndim != 2 or (self._mean is not None and features.shape[1] != self._mean.numel()):
            wanted = "(N, D)" if self._mean is None else f"(N, {self._mean.numel()})"
            raise ValueError(f"features of shape {wanted} are needed, got {tuple(features.shape)}")
        if len(features) == 0:
            return
        if features.device.type == "mps":  # has no float64
            features = features.cpu()
        features = features.double()
        mean = features.mean(dim=0)
        centred = features - mean
        self._merge(len(features), mean, centred.mT @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Take in all that ``other`` has seen."""
        if other._mean is not None and other._scatter is not None:
            self._merge(other.count, other._mean, other._scatter)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        total = self.count + count
        delta = mean.to(self._mean.device) - self._mean
        self._scatter += scatter.to(delta.device) + torch.outer(delta, delta) * (self.count * count / total)
        self._mean += delta * (count / total)
        self.count = total

    def gaussian(self, fingerprint: str | None = None) -> Gaussian:
        """Mean and covariance of all that has arrived, of the extractor with this fingerprint.

        Raises:
            ValueError: fewer than two samples.
        """
        if self._mean is None or self._scatter is None or self.count < 2:
            raise ValueError(f"a covariance needs two samples or more, got {self.count}")
        return Gaussian(self._mean.clone(), self._scatter / (self.count - 1), self.count, fingerprint)

    def gathered(self) -> FeatureStatistics:
        """Statistics over all ranks, the same on each; a copy where there is one process only.

        Ranks may have seen different numbers of samples, or none. Every rank must call it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            result = FeatureStatistics()
            result.merge(self)
            return result
        device = _communication_device()
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, (self.count, 0 if self._mean is None else self._mean.numel()))
        return self._summed(sum(count for count, _ in states), max(size for _, size in states), device)

    def _summed(self, total: int, num_features: int, device: torch.device) -> FeatureStatistics:
        """Two sums over ranks: the common mean first, then the scatter around it."""
        mean = torch.zeros(num_features, dtype=torch.float64, device=device)  # (D,)
        scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)  # (D, D)
        if self._mean is not None:
            mean += self._mean.to(device) * (self.count / total)
        dist.all_reduce(mean)
        if self._mean is not None and self._scatter is not None:
            delta = self._mean.to(device) - mean
            scatter += self._scatter.to(device) + torch.outer(delta, delta) * self.count
        dist.all_reduce(scatter)
        result = FeatureStatistics()
        if total:
            result._merge(total, mean, scatter)
        return result


def _communication_device() -> torch.device:
    # NCCL moves CUDA tensors only, gloo is surest with CPU ones.
    is_nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def _float64(value: Array) -> Tensor:
    # On CPU: float64 is missing on MPS and slow on many GPUs, and this runs once per evaluation.
    return torch.as_tensor(value).detach().to("cpu", torch.float64)
