"""Inception Score (Salimans et al. 2016): confident on each sample, diverse over all of them."""

from __future__ import annotations

from torch import Tensor


def inception_score(logits: Tensor, *, num_splits: int = 1) -> float:
    """``exp`` of the mean divergence of ``p(y|x)`` from ``p(y)``, averaged over splits: (N, classes) -> number.

    Between 1 and the number of classes. Ten splits of 50,000 samples are usual; the score depends on that choice.

    Raises:
        ValueError: more splits than samples.
    """
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f"{len(logits)} samples cannot be split into {num_splits} parts; choose 1 to {len(logits)}")
    scores = [_score(part.double().log_softmax(dim=1)) for part in logits.tensor_split(num_splits)]
    return float(sum(scores) / num_splits)


def _score(log_p: Tensor) -> float:
    log_p = log_p.clamp(min=-1e4)  # a class that is ruled out adds 0, not 0 * inf
    p = log_p.exp()  # (n, classes)
    log_marginal = p.mean(dim=0, keepdim=True).log().clamp(min=-1e4)
    return float((p * (log_p - log_marginal)).sum(dim=1).mean().exp())
