"""The discrete Gaussian diffusion of DDPM as DiT uses it: tables, q, p, and one ancestral step.

Shape legend: N batch, C latent channels, ... any latent axes after them (H, W or F, H, W), S steps.
Time runs from t = 0 (data) to noise; ``t`` is a step index, see ``flexidit.diffusion``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flexidit.diffusion.tables import StepTables

FixedVariance: TypeAlias = Literal["small", "large"]


@dataclass(frozen=True)
class Posterior:
    """Gaussian over x_{t-1} given x_t, with the clean latents it rests on."""

    mean: Tensor
    """(N, C, ...)"""
    log_variance: Tensor
    """(N, C, ...) if learned, else (N, 1, ...): natural logarithm, clipped at t = 0 where the true variance is 0."""
    x_start: Tensor
    """(N, C, ...): the clean latents, given or predicted."""

    @property
    def variance(self) -> Tensor:
        """Shape of ``log_variance``."""
        return self.log_variance.exp()


class GaussianDiffusion:
    """A Markov chain of Gaussian noising steps, and its reversal (Ho et al. 2020; Nichol and Dhariwal 2021).

    Tables are float64 and outside any module, step indices are not range-checked: see :class:`StepTables`.

    Example:
        >>> diffusion = GaussianDiffusion()
        >>> diffusion.num_timesteps, diffusion.respaced(250).num_timesteps
        (1000, 250)
        >>> diffusion.respaced(5).timestep_map
        (0, 250, 500, 749, 999)
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        """The linear schedule: betas spaced evenly from ``beta_start`` to ``beta_end``; the defaults are DiT's.

        Raises:
            ValueError: fewer than two steps, or betas outside (0, 1).
        """
        betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64, device="cpu")
        self._build(betas, range(num_timesteps))

    @classmethod
    def from_betas(cls, betas: Tensor, timestep_map: Sequence[int] | None = None) -> GaussianDiffusion:
        """A process with any variances of the noising steps.

        Args:
            betas: (S,), variance added by each step, in (0, 1).
            timestep_map: (S,), the time that the model is given at each step; ``None`` means 0, 1, 2, ...

        Raises:
            ValueError: fewer than two steps, betas outside (0, 1), or a map of another length.
        """
        diffusion = cls.__new__(cls)
        timestep_map = range(len(betas)) if timestep_map is None else timestep_map
        diffusion._build(betas.detach().to("cpu", torch.float64), timestep_map)
        return diffusion

    def _build(self, betas: Tensor, timestep_map: Sequence[int]) -> None:
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"a diffusion needs two or more betas, each between 0 and 1, got {betas.tolist()[:5]}...")
        if len(timestep_map) != len(betas):
            raise ValueError(
                f"a map of {len(timestep_map)} timesteps does not fit {len(betas)} betas; give one per beta"
            )
        # An inference tensor kept here would refuse every later backward.
        with torch.inference_mode(False), torch.no_grad():
            self.betas = betas.clone()
            self.alphas_cumprod = (1 - self.betas).cumprod(0)
            self.timestep_map = tuple(int(t) for t in timestep_map)
            self._tables = StepTables(_tables(self.betas, self.alphas_cumprod, self.timestep_map))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_timesteps={self.num_timesteps})"

    @property
    def num_timesteps(self) -> int:
        """Number of steps of this process."""
        return len(self.timestep_map)

    def respaced(self, num_steps: int) -> GaussianDiffusion:
        """The process that visits ``num_steps`` evenly spaced levels of this one, the first and the last among them.

        Spacing is that of DiT's ``create_diffusion(str(num_steps))``, rounding included; ``timestep_map`` keeps the
        times that the model knows.

        Raises:
            ValueError: ``num_steps`` is below two or above the number of steps there are.
        """
        if not 2 <= num_steps <= self.num_timesteps:
            raise ValueError(
                f"cannot respace {self.num_timesteps} steps to {num_steps}; give 2 to {self.num_timesteps}"
            )
        kept = even_timesteps(self.num_timesteps, num_steps)
        alphas_cumprod = self.alphas_cumprod[kept]
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        return self.from_betas(1 - alphas_cumprod / previous, [self.timestep_map[t] for t in kept])

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Times for the model at the step indices ``t``: (N,) -> (N,), int64."""
        return self._tables.lookup("timestep", t).long()

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Clean latents noised to level ``t`` in one go, q(x_t | x_0): (N, C, ...) -> (N, C, ...)."""
        signal = self._coefficient("sqrt_alphas_cumprod", t, x_start)
        return signal * x_start + self._coefficient("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def target(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """What a model of this process predicts: the noise."""
        return noise

    def predict_x_start(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Clean latents that ``x_t`` came from if its noise was ``eps``: inverse of :meth:`q_sample`."""
        scale = self._coefficient("sqrt_recip_alphas_cumprod", t, x_t)
        return scale * x_t - self._coefficient("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def predict_eps(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """Noise that ``x_t`` holds if it came from ``x_start``: inverse of :meth:`predict_x_start`."""
        scale = self._coefficient("sqrt_recip_alphas_cumprod", t, x_t)
        return (scale * x_t - x_start) / self._coefficient("sqrt_recipm1_alphas_cumprod", t, x_t)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        """The true q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        mean = self._coefficient("posterior_mean_x_start", t, x_t) * x_start
        mean = mean + self._coefficient("posterior_mean_x_t", t, x_t) * x_t
        return Posterior(mean, self._coefficient("log_variance_small", t, x_t), x_start)

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, fixed_variance: FixedVariance = "large"
    ) -> Posterior:
        """The model's p(x_{t-1} | x_t). Predicted clean latents are not clipped, as in DiT's sampling.

        Args:
            model_output: (N, 2C, ...): noise prediction, then where the log variance lies between its bounds, -1 for
                the posterior variance and 1 for beta (Nichol and Dhariwal 2021, eq. 15); or (N, C, ...): noise alone.
            x_t: (N, C, ...).
            t: (N,), step indices.
            fixed_variance: which bound to use when the model predicts noise alone. ``"large"`` is DiT's choice: beta,
                but at t = 0 the posterior variance of t = 1.

        Raises:
            ValueError: another number of channels, or an unknown ``fixed_variance``.
        """
        eps, fraction = split_output(model_output, x_t.shape[1])
        posterior = self.q_posterior(self.predict_x_start(x_t, t, eps), x_t, t)
        if fraction is not None:
            log_variance = self._learned_log_variance(fraction, t, x_t)
        else:
            log_variance = self._fixed_log_variance(fixed_variance, t, x_t)
        return Posterior(posterior.mean, log_variance, posterior.x_start)

    def ddpm_step(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, fixed_variance: FixedVariance = "large"
    ) -> Tensor:
        """One ancestral step from index ``t`` to ``t - 1``, differentiable in ``model_output`` and ``x_t``.

        At t = 0 the mean is returned: no noise is added to data. Arguments as in :meth:`p_mean_variance`; ``noise`` is
        standard normal, (N, C, ...).
        """
        p = self.p_mean_variance(model_output, x_t, t, fixed_variance)
        scale = self._coefficient("is_noisy", t, x_t) * (0.5 * p.log_variance).exp()
        return p.mean + scale * noise

    def _learned_log_variance(self, fraction: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        weight = (fraction + 1) / 2
        low = self._coefficient("log_variance_small", t, x_t)
        return weight * self._coefficient("log_betas", t, x_t) + (1 - weight) * low

    def _fixed_log_variance(self, which: FixedVariance, t: Tensor, x_t: Tensor) -> Tensor:
        if which not in ("small", "large"):
            raise ValueError(f"the fixed variance is 'small' or 'large', got {which!r}")
        return self._coefficient(f"log_variance_{which}", t, x_t)

    def _coefficient(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        return self._tables.coefficient(name, t, x)


def split_output(model_output: Tensor, num_channels: int) -> tuple[Tensor, Tensor | None]:
    """Noise prediction and, when there are twice as many channels, the variance fraction: (N, C | 2C, ...).

    Raises:
        ValueError: any other number of channels.
    """
    if model_output.shape[1] == num_channels:
        return model_output, None
    if model_output.shape[1] == 2 * num_channels:
        eps, fraction = model_output.split(num_channels, dim=1)
        return eps, fraction
    raise ValueError(
        f"latents of {num_channels} channels need a model output of {num_channels} (noise) or {2 * num_channels} "
        f"(noise and variance) channels, got {model_output.shape[1]}"
    )


def even_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """``num_steps`` indices of ``0 .. num_timesteps - 1``, ascending, spaced as DiT spaces them.

    The position is accumulated in floating point and then rounded, half to even. This is not ``linspace``: positions
    that should fall on one half land beside it for a few counts (1000 steps to 23, for one), and the result must be
    DiT's.
    """
    stride = (num_timesteps - 1) / (num_steps - 1)
    position, timesteps = 0.0, []
    for _ in range(num_steps):
        timesteps.append(round(position))
        position += stride
    return timesteps


def _tables(betas: Tensor, alphas_cumprod: Tensor, timestep_map: Sequence[int]) -> dict[str, Tensor]:
    """Everything that is looked up by step index, each (S,) float64."""
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # The posterior variance is 0 at t = 0, and its logarithm would not be finite: there, both take that of t = 1.
    clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
    return {
        "timestep": torch.tensor(timestep_map, dtype=torch.float64, device="cpu"),
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "sqrt_recip_alphas_cumprod": alphas_cumprod.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
        "posterior_mean_x_start": betas * previous.sqrt() / (1 - alphas_cumprod),
        "posterior_mean_x_t": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        "log_betas": betas.log(),
        "log_variance_small": clipped.log(),
        "log_variance_large": torch.cat([clipped[:1], betas[1:]]).log(),
        "is_noisy": (torch.arange(len(betas), device="cpu") > 0).double(),
    }
