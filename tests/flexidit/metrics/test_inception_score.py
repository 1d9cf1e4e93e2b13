"""The score's two ends, and torchmetrics on the same logits."""

import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from flexidit.metrics.inception_score import inception_score


def test_between_one_and_the_number_of_classes() -> None:
    assert inception_score(torch.zeros(20, 5)) == pytest.approx(1.0)
    assert inception_score(100 * torch.eye(5).repeat(4, 1)) == pytest.approx(5.0)
    assert inception_score(100 * torch.eye(5)[:1].repeat(4, 1)) == pytest.approx(1.0)
    assert inception_score(torch.tensor([[0.0, -torch.inf], [0.0, -1e5]])) == pytest.approx(1.0)


def test_agrees_with_torchmetrics() -> None:
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    theirs = InceptionScore(feature=torch.nn.Flatten(), splits=1)
    theirs.update(logits.view(64, 5, 1, 1))
    assert inception_score(logits) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_splits_are_averaged() -> None:
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    halves = [inception_score(part) for part in logits.split(32)]
    assert inception_score(logits, num_splits=2) == pytest.approx(sum(halves) / 2)
    with pytest.raises(ValueError, match="64 samples cannot be split into 65 parts"):
        inception_score(logits, num_splits=65)
