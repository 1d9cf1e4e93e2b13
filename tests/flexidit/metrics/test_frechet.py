"""The distance against closed forms and three peers; the accumulator against numpy, over batches and over ranks."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from flexidit.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance, symmetric_sqrt


def features(count: int, size: int = 6, seed: int = 0) -> Tensor:
    """Correlated, off-centre features (count, size)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing + 3.0


def gaussian(x: Tensor) -> Gaussian:
    statistics = FeatureStatistics()
    statistics.update(x)
    return statistics.gaussian()


def peers(a: Gaussian, b: Gaussian) -> dict[str, float]:
    from cleanfid import fid as cleanfid  # here, because spawned processes import this file too
    from scipy import linalg
    from torchmetrics.image.fid import _compute_fid

    (m1, c1), (m2, c2) = ((g.mean.numpy(), g.covariance.numpy()) for g in (a, b))
    root = linalg.sqrtm(c1 @ c2)
    return {
        "scipy": float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root.real)),
        "clean-fid": float(cleanfid.frechet_distance(m1, c1, m2, c2)),
        "torchmetrics": float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance)),
    }


@pytest.fixture(autouse=True)
def old_sqrtm(monkeypatch: pytest.MonkeyPatch) -> None:
    """clean-fid asks for ``sqrtm(..., disp=False)`` and two results, which newer versions of scipy do not give."""
    from scipy import linalg

    sqrtm = linalg.sqrtm

    def compatible(matrix: np.ndarray, disp: bool | None = None) -> object:
        return sqrtm(matrix) if disp is None else (sqrtm(matrix), None)

    monkeypatch.setattr(linalg, "sqrtm", compatible)


@pytest.mark.parametrize("size", [1, 6, 64])
def test_agrees_with_scipy_cleanfid_and_torchmetrics(size: int) -> None:
    a, b = gaussian(features(500, size, 1)), gaussian(features(400, size, 2) * 1.5)
    for name, distance in peers(a, b).items():
        assert a.distance(b) == pytest.approx(distance, rel=1e-8), name


def test_diagonal_covariances_have_a_closed_form() -> None:
    s1, s2 = torch.tensor([1.0, 4.0, 0.0]).double(), torch.tensor([9.0, 4.0, 16.0]).double()
    distance = frechet_distance(torch.zeros(3), s1.diag(), torch.ones(3), s2.diag())
    assert distance == pytest.approx(3 + float((s1.sqrt() - s2.sqrt()).square().sum()), rel=1e-12)


def test_zero_to_itself_and_symmetric_even_with_fewer_samples_than_features() -> None:
    a, b = gaussian(features(5, 64, 1)), gaussian(features(7, 64, 2))
    assert a.distance(a) == pytest.approx(0.0, abs=1e-9 * float(a.covariance.trace()))
    assert a.distance(b) == pytest.approx(b.distance(a), rel=1e-10)


def test_rank_deficient_equals_the_limit_of_regularised() -> None:
    a, b = gaussian(features(5, 20, 1)), gaussian(features(7, 20, 2))
    ridge = 1e-10 * torch.eye(20).double()
    limit = peers(Gaussian(a.mean, a.covariance + ridge), Gaussian(b.mean, b.covariance + ridge))["scipy"]
    assert a.distance(b) == pytest.approx(limit, rel=1e-4)


def test_invariant_under_rotation_and_quadratic_in_scale() -> None:
    x, y = features(50, seed=1), features(60, seed=2)
    rotation = torch.linalg.qr(features(6, seed=3)).Q
    distance = gaussian(x).distance(gaussian(y))
    assert gaussian(x @ rotation).distance(gaussian(y @ rotation)) == pytest.approx(distance, rel=1e-10)
    assert gaussian(3 * x).distance(gaussian(3 * y)) == pytest.approx(9 * distance, rel=1e-10)


def test_symmetric_sqrt_squares_to_its_matrix() -> None:
    matrix = gaussian(features(5, 20)).covariance
    root = symmetric_sqrt(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root, root.mT)


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(2, 2\), \(3,\), \(3, 3\)\]"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.full((2,), torch.nan), torch.eye(2))
    statistics = FeatureStatistics()
    statistics.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"\(N, 3\) are needed, got \(1, 2\)"):
        statistics.update(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="two samples"):
        gaussian(torch.zeros(1, 3))


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_batches_do_not_matter(batch: int) -> None:
    x = features(40)
    statistics = FeatureStatistics()
    for part in (*x.split(batch), x[:0]):
        statistics.update(part)
    result = statistics.gaussian()
    np.testing.assert_allclose(result.mean, np.mean(x.numpy(), axis=0), rtol=1e-13)
    np.testing.assert_allclose(result.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-11)
    assert result.count == 40


def test_merging_equals_seeing_all() -> None:
    x, left, right = features(30), FeatureStatistics(), FeatureStatistics()
    left.update(x[:4])
    right.update(x[4:])
    left.merge(right)
    left.merge(FeatureStatistics())
    torch.testing.assert_close(left.gaussian().covariance, gaussian(x).covariance, rtol=1e-12, atol=0)


def test_no_cancellation_far_from_the_origin() -> None:
    x = features(100)
    shifted = gaussian(x + 1e6)
    torch.testing.assert_close(shifted.covariance, gaussian(x).covariance, rtol=1e-6, atol=1e-8)


def test_updates_do_not_wait_for_the_device() -> None:
    """On meta tensors, which have no values: whatever reads one fails."""
    statistics = FeatureStatistics()
    for _ in range(2):
        statistics.update(torch.zeros(3, 4, device="meta"))
    assert statistics.count == 6


def test_files_are_those_of_cleanfid_and_adm(tmp_path: Path) -> None:
    a = gaussian(features(30))
    replace(a, fingerprint="inception/abc").save(tmp_path / "ours.npz")
    again = Gaussian.load(tmp_path / "ours.npz")
    assert again.fingerprint == "inception/abc"
    assert torch.equal(a.mean, again.mean) and torch.equal(a.covariance, again.covariance) and again.count == 30
    np.savez(tmp_path / "theirs.npz", mu=a.mean.numpy(), sigma=a.covariance.numpy())
    theirs = Gaussian.load(tmp_path / "theirs.npz")
    assert theirs.count is None and theirs.fingerprint is None
    assert theirs.distance(a) == pytest.approx(0.0, abs=1e-9)


def test_files_without_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no reference statistics at"):
        Gaussian.load(tmp_path / "missing.npz")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['arr_0'\]"):
        Gaussian.load(tmp_path / "images.npz")


def gather(rank: int, root: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=2)
    x = features(31)
    for name, first in (("uneven", 20), ("empty", 31)):
        statistics = FeatureStatistics()
        statistics.update((x[:first], x[first:])[rank])
        statistics.gathered().gaussian().save(f"{root}/{name}{rank}.npz")
        assert statistics.count == (first, 31 - first)[rank]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive their group, and unloading them has aborted a rank that was done


def test_uneven_ranks_agree_with_one_process(tmp_path: Path) -> None:
    mp.spawn(gather, args=(str(tmp_path),), nprocs=2)
    whole = gaussian(features(31))
    for name in ("uneven", "empty"):
        parts = [Gaussian.load(tmp_path / f"{name}{rank}.npz") for rank in range(2)]
        assert torch.equal(parts[0].covariance, parts[1].covariance)
        assert parts[0].count == 31
        torch.testing.assert_close(parts[0].covariance, whole.covariance, rtol=1e-11, atol=1e-12)


def test_gathering_in_one_process_copies() -> None:
    statistics = FeatureStatistics()
    statistics.update(features(5))
    copy = statistics.gathered()
    statistics.update(features(5, seed=1))
    assert (copy.count, statistics.count) == (5, 10)
