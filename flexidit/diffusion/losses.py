"""The training loss: mean squared error of the prediction, plus the variational bound of a learned variance (DiT's).

Shape legend: N batch, C latent channels, ... any latent axes after them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexidit.diffusion.gaussian import GaussianDiffusion, split_output
from flexidit.diffusion.process import Process


@dataclass(frozen=True)
class TrainingLoss:
    """Loss of each sample; take the mean for a training step."""

    total: Tensor
    """(N,): what is minimised, ``mse + vb``."""
    mse: Tensor
    """(N,): squared error of the predicted noise or velocity, mean over all elements."""
    vb: Tensor
    """(N,): variational bound at this t, in bits per element; zero without a learned variance."""


def training_loss(
    process: Process,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    learn_sigma: bool = True,
) -> TrainingLoss:
    """The squared error of the prediction, and DiT's loss where that is noise: ``create_diffusion("")`` trains with it.

    DiT's loss type is plain ``MSE`` (``rescale_learned_sigmas=False``), so the bound of the one drawn t is added as it
    is: in bits (nats / ln 2), mean over the elements, neither multiplied by the number of steps nor divided by 1000.
    (With 1000 steps the rescaled type has the factor 1000 / 1000: both are the same.) The bound trains the variance
    only: the noise prediction enters it detached, and nothing is clipped.

    Half-precision inputs are raised to float32: the bound takes logarithms of differences.

    Args:
        process: what ``x_t`` was drawn from.
        model_output: (N, 2C, ...) with a learned variance, else (N, C, ...).
        x_start: (N, C, ...), clean latents.
        x_t: (N, C, ...), ``process.q_sample(x_start, t, noise)``.
        t: (N,), step indices of ``process``.
        noise: (N, C, ...), the noise in ``x_t``.
        learn_sigma: whether the model predicts the variance too.

    Raises:
        ValueError: the output's channels do not fit ``learn_sigma``, or a flow is to have a variance.
    """
    model_output, x_start, x_t, noise = (_at_least_float32(x) for x in (model_output, x_start, x_t, noise))
    prediction, fraction = split_output(model_output, x_start.shape[1])
    if learn_sigma != (fraction is not None):
        expected = x_start.shape[1] * (2 if learn_sigma else 1)
        raise ValueError(f"learn_sigma={learn_sigma} needs {expected} output channels, got {model_output.shape[1]}")
    mse = _mean_flat((process.target(x_start, noise) - prediction) ** 2)
    if fraction is None:
        return TrainingLoss(mse, mse, torch.zeros_like(mse))
    if not isinstance(process, GaussianDiffusion):
        raise ValueError(f"a {type(process).__name__} has no variance to learn; give learn_sigma=False")
    vb = variational_bound(process, torch.cat([prediction.detach(), fraction], dim=1), x_start, x_t, t)
    return TrainingLoss(mse + vb, mse, vb)


def variational_bound(
    diffusion: GaussianDiffusion, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """One term of the variational bound, in bits per element: (N,).

    For t > 0 the divergence of the model's step from the true posterior, KL(q || p); at t = 0 the negative log
    likelihood of the data, discretised to 256 levels in [-1, 1] (Ho et al. 2020, eq. 13). DiT applies the latter to
    latents as well.
    """
    q = diffusion.q_posterior(x_start, x_t, t)
    p = diffusion.p_mean_variance(model_output, x_t, t)
    kl = _mean_flat(normal_kl(q.mean, q.log_variance, p.mean, p.log_variance))
    nll = -_mean_flat(discretized_log_likelihood(x_start, p.mean, 0.5 * p.log_variance))
    return torch.where(t == 0, nll, kl) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of each element, in nats."""
    difference = log_variance1 - log_variance2
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (torch.expm1(difference) - difference + distance)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, in nats, of the bin of width 2 / 255 around each element of ``x`` under a normal distribution.

    The bins at the ends of [-1, 1] reach to infinity. The distribution function is the tanh approximation, as in DiT:
    the exact one would not reproduce its losses.
    """
    inverse_scale = torch.exp(-log_scale)
    upper = _normal_cdf((x - mean + 1 / 255) * inverse_scale)
    lower = _normal_cdf((x - mean - 1 / 255) * inverse_scale)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
