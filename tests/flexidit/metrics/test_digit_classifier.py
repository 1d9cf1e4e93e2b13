"""The classifier learns, repeats itself, and leaves the global random state alone."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from flexidit.metrics.digit_classifier import DigitClassifier, train_digit_classifier
from flexidit.metrics.features import FeatureExtractor


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 in a fixed random order: the file is sorted by writer."""
    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return (torch.tensor(data.images).float().unsqueeze(1) / 8 - 1)[order], torch.tensor(data.target)[order]


@pytest.fixture(scope="module")
def trained() -> DigitClassifier:
    x, y = digits()
    return train_digit_classifier(x[:1437], y[:1437], seed=0)


def test_reads_digits_that_it_has_not_seen(trained: DigitClassifier) -> None:
    x, y = digits()
    assert trained.accuracy(x[1437:], y[1437:]) > 0.97


def test_features_are_what_the_logits_are_made_of(trained: DigitClassifier) -> None:
    x, _ = digits()
    assert isinstance(trained, FeatureExtractor)
    assert trained(x[:3]).shape == (3, 64)
    torch.testing.assert_close(trained.head(trained(x[:3])), trained.logits(x[:3]))
    torch.testing.assert_close(trained(x[:8])[2:3], trained(x[2:3]))  # no statistics of the batch
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_a_pure_function_of_the_seed() -> None:
    x, y = digits()
    state = torch.get_rng_state()
    one, same, other = (train_digit_classifier(x[:96], y[:96], seed, num_epochs=1) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert torch.equal(torch.get_rng_state(), state)


def test_other_sizes_work() -> None:
    assert DigitClassifier()(torch.zeros(2, 1, 16, 12)).shape == (2, 64)


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 8, 8\) and \(3,\)"):
        train_digit_classifier(torch.zeros(3, 8, 8), torch.zeros(3))
