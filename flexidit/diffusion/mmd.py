"""The bootstrapped distribution-matching loss (paper, appendix B.1; READING.md 1-3).

Training on noised data never shows the powerful patch sizes the errors of the weak ones, which come before them at
inference. Here real latents are noised to a time t2 and denoised for a few steps, weak sizes first, down to t1; the
result should be distributed as real latents noised directly to t1, and the maximum mean discrepancy (MMD; Gretton et
al. 2012) measures by how much it is not.

Shape legend: N and M samples, D elements of a flattened sample, C latent channels, ... latent axes after them.
Times are step indices of the (respaced) process, t1 < t2, and t2 is the noisier one: see ``flexidit.diffusion``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.patch_size import PatchSize

Estimator: TypeAlias = Literal["biased", "unbiased"]
Denoiser: TypeAlias = Callable[[Tensor, Tensor, Tensor, PatchSize], Tensor]
"""``denoise(x_t, t, y, patch_size)``: model output at the model's own times t (N,), (N, C, ...) -> (N, C | 2C, ...)."""

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""Where noise is drawn from: one generator, one for each sample, or PyTorch's global one."""

# Squared bandwidths of the default mixture, relative to the median squared distance.
_MIXTURE = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class ChainPlan:
    """How many denoising steps each patch size takes, in the order they are taken: weakest first.

    The order is that of inference. (The intervals printed in B.1 give the opposite of its text; READING.md 2.)

    Example:
        >>> plan = ChainPlan.from_steps({2: 2, 4: 1})
        >>> [size.name for size in plan], len(plan), plan.num_powerful_steps
        (['1x4x4', '1x2x2', '1x2x2'], 3, 2)
    """

    stages: tuple[tuple[PatchSize, int], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.stages]
        if not sizes or any(num_steps < 1 for _, num_steps in self.stages):
            raise ValueError(f"a chain needs at least one step of each of its patch sizes, got {self._text()}")
        if any(not earlier > later for earlier, later in pairwise(sizes)):
            raise ValueError(f"a chain goes from the weakest to the most powerful patch size, got {self._text()}")

    @classmethod
    def from_steps(cls, steps_per_size: Mapping[Any, int]) -> ChainPlan:
        """A plan from ``{patch size: number of steps}``, in any order; sizes as ``PatchSize.parse`` reads them."""
        stages = [(PatchSize.parse(size), num_steps) for size, num_steps in steps_per_size.items()]
        return cls(tuple(sorted(stages, key=lambda stage: stage[0], reverse=True)))

    @property
    def num_powerful_steps(self) -> int:
        """Steps of the most powerful size, which are the last ones."""
        return self.stages[-1][1]

    def __len__(self) -> int:
        return sum(num_steps for _, num_steps in self.stages)

    def __iter__(self) -> Iterator[PatchSize]:
        for size, num_steps in self.stages:
            yield from (size for _ in range(num_steps))

    def _text(self) -> str:
        return ", ".join(f"{size}:{num_steps}" for size, num_steps in self.stages) or "nothing"


def sample_time_pair(
    num_timesteps: int, num_steps: int, *, generator: torch.Generator, location: float = -1.0, scale: float = 1.0
) -> tuple[int, int]:
    """Times ``(t1, t2)`` of one chain of ``num_steps`` steps: step indices, ``0 <= t1``, ``t2 = t1 + num_steps``.

    One pair serves the whole global batch, so that every rank runs equally many steps; seed ``generator`` by
    (seed, step), without the rank. The relative time t1 / (num_timesteps - num_steps) is logit-normal: the mismatch is
    largest near the data (paper, Fig. 11 left and C.2), and a negative ``location`` draws small t1 more often. The
    paper gives no numbers: with the defaults, five of six t1 lie in the cleaner half.

    Args:
        num_timesteps: of the respaced process, 250 in the paper.
        num_steps: length of the chain, ``len(plan)``.
        generator: on the CPU; a draw on an accelerator would have to be waited for.
        location: mean of the logit.
        scale: standard deviation of the logit.

    Raises:
        ValueError: the chain does not fit into the process, or the generator is not on the CPU.
    """
    if not 0 < num_steps < num_timesteps:
        raise ValueError(f"a chain in {num_timesteps} timesteps has 1 to {num_timesteps - 1} steps, got {num_steps}")
    if generator.device.type != "cpu":
        raise ValueError(f"the time pair is drawn on the CPU, got a generator on {generator.device}; give a CPU one")
    logit = location + scale * torch.randn((), generator=generator, dtype=torch.float64, device="cpu").item()
    highest = num_timesteps - num_steps - 1
    t1 = min(int((highest + 1) * _sigmoid(logit)), highest)
    return t1, t1 + num_steps


def bootstrapped_mmd_loss(
    denoise: Denoiser,
    diffusion: GaussianDiffusion,
    x_start: Tensor,
    x_start_other: Tensor,
    y: Tensor,
    *,
    plan: ChainPlan,
    times: tuple[int, int],
    generator: Generators = None,
    backprop_steps: int | None = None,
    bandwidths: Sequence[float] | None = None,
    estimator: Estimator = "biased",
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Squared MMD between latents denoised from t2 to t1 and latents noised directly to t1.

    With several ranks this is the loss of the global batch, equal on all of them (see :func:`gather_across_ranks`):
    add it to the local mean of the other losses and let DDP or FSDP average gradients as usual.

    Args:
        denoise: the student, given the model's own times.
        diffusion: the process of inference, ``GaussianDiffusion().respaced(250)`` in the paper.
        x_start: (N, C, ...), clean latents of the target.
        x_start_other: (M, C, ...), other clean latents, from which the chain starts.
        y: (M, ...), their condition. The loss compares samples regardless of it.
        plan: patch sizes of the chain.
        times: ``(t1, t2)`` from :func:`sample_time_pair`, the same on all ranks.
        generator: noise of both ends and of the chain, on the device of the latents, different on each rank; one for
            each sample, where draws must not depend on how samples are split over ranks (N = M then); ``None`` means
            PyTorch's global one.
        backprop_steps: how many of the last steps carry gradients. Each costs the activations of one forward, unless
            the model checkpoints them. ``None`` means the steps of the most powerful size; the paper does not say.
        bandwidths: see :func:`rbf_mmd`.
        estimator: see :func:`rbf_mmd`.
        gather: joins the samples of all ranks; ``None`` means :func:`gather_across_ranks`.

    Returns:
        () scalar.

    Raises:
        ValueError: ``times`` do not fit the plan or the process, or ``backprop_steps`` does not fit the plan.
    """
    gather = gather or gather_across_ranks
    t1, t2 = times
    if t2 - t1 != len(plan) or not 0 <= t1 < t2 < diffusion.num_timesteps:
        raise ValueError(
            f"times {times} do not fit a chain of {len(plan)} steps in {diffusion.num_timesteps} timesteps; "
            "draw them with sample_time_pair"
        )
    with torch.no_grad():
        target = diffusion.q_sample(x_start, _full(t1, x_start), _noise_like(x_start, generator))
        x_t = diffusion.q_sample(x_start_other, _full(t2, x_start_other), _noise_like(x_start_other, generator))
    x_t = denoise_chain(denoise, diffusion, x_t, t2, y, plan=plan, generator=generator, backprop_steps=backprop_steps)
    return rbf_mmd(gather(x_t), gather(target), bandwidths=bandwidths, estimator=estimator)


def denoise_chain(
    denoise: Denoiser,
    diffusion: GaussianDiffusion,
    x_t: Tensor,
    t: int,
    y: Tensor,
    *,
    plan: ChainPlan,
    generator: Generators = None,
    backprop_steps: int | None = None,
) -> Tensor:
    """Latents after ``len(plan)`` ancestral steps from index ``t``, gradients through the last ones only.

    (N, C, ...) -> (N, C, ...), at index ``t - len(plan)``. Arguments as in :func:`bootstrapped_mmd_loss`.

    Raises:
        ValueError: ``backprop_steps`` is not between 1 and the length of the plan.
    """
    backprop_steps = plan.num_powerful_steps if backprop_steps is None else backprop_steps
    if not 1 <= backprop_steps <= len(plan):
        raise ValueError(f"backprop_steps is 1 to {len(plan)}, the length of the chain, got {backprop_steps}")
    first_with_grad = len(plan) - backprop_steps
    for index, patch_size in enumerate(plan):
        if index == first_with_grad:
            # Before torch 2.11, weights that autocast has cast under no_grad stay cached without their history, and the
            # steps that follow would silently train nothing (pytorch issues 112583 and 158232).
            torch.clear_autocast_cache()
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= first_with_grad):
            now = _full(t - index, x_t)
            model_output = denoise(x_t, diffusion.model_timesteps(now), y, patch_size)
            # "small" is what the sampler uses where the variance is not learned: the chain imitates it.
            x_t = diffusion.ddpm_step(model_output, x_t, now, _noise_like(x_t, generator), "small")
    return x_t


def rbf_mmd(
    x: Tensor, y: Tensor, *, bandwidths: Sequence[float] | None = None, estimator: Estimator = "biased"
) -> Tensor:
    """Squared MMD of two sets under a mean of RBF kernels exp(-d^2 / (2 b^2)) (Gretton et al. 2012, eq. 3 and 5).

    Computed in float32 at least, autocast or not, without waiting for the device. Memory: a few (N + M)^2 matrices.

    Args:
        x: (N, ...), flattened to (N, D).
        y: (M, ...), flattened to (M, D).
        bandwidths: the b of each kernel, in the units of the data. ``None`` means the median heuristic: b^2 is 1/4,
            1/2, 1, 2 and 4 times the median squared distance within both sets together, a constant to backward.
        estimator: ``"biased"`` counts each sample's kernel with itself: never negative, zero for equal sets, but above
            zero on average for two draws of one distribution. ``"unbiased"`` leaves those out: zero on average there,
            thus sometimes negative. The biased gradient repels the samples of x from each other by a factor
            (N - 1) / N too little, which favours sets that are slightly too narrow: with few samples, take unbiased.

    Returns:
        () scalar.

    Raises:
        ValueError: samples of unequal size, too few samples, an unknown estimator, or a bandwidth that is not positive.
    """
    _check_mmd(x, y, bandwidths, estimator)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with _full_precision(x.device.type):
        distances = _squared_distances(torch.cat([x.flatten(1).to(dtype), y.flatten(1).to(dtype)]))
        kernel = _mixture(distances, bandwidths)
    n = len(x)
    within_x, within_y, across = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    if estimator == "unbiased":
        return _mean_off_diagonal(within_x) + _mean_off_diagonal(within_y) - 2 * across.mean()
    return within_x.mean() + within_y.mean() - 2 * across.mean()


def gather_across_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Samples of all ranks in rank order, with gradients: (N, ...) -> (world * N, ...). In one process, the identity.

    For a loss that each rank then computes *identically* from the gathered samples. Backward hands each rank the
    gradient of its own samples times the number of ranks, without communication. The averaging of gradients over ranks
    in DDP and FSDP divides by that number again, which leaves the sum over all samples: the gradient of the global
    loss. (A plain slice would leave 1 / world of it.) Parameters whose gradients are not averaged need another rule.

    Every rank must hold the same number of samples; drop the last incomplete batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return x
    return _Gather.apply(x, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.rank, ctx.world_size = dist.get_rank(group), dist.get_world_size(group)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ctx.world_size)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.chunk(ctx.world_size)[ctx.rank] * ctx.world_size, None


def _check_mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None, estimator: str) -> None:
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"both sets need samples of one shape, got {tuple(x.shape[1:])} and {tuple(y.shape[1:])}")
    if estimator not in ("biased", "unbiased"):
        raise ValueError(f"the estimator is 'biased' or 'unbiased', got {estimator!r}")
    fewest = 2 if estimator == "unbiased" else 1
    if min(len(x), len(y)) < fewest:
        raise ValueError(f"the {estimator} estimator needs {fewest} or more samples a set, got {len(x)} and {len(y)}")
    if bandwidths is not None and (not bandwidths or min(bandwidths) <= 0):
        raise ValueError(f"bandwidths are positive numbers, got {list(bandwidths)}; None means the median heuristic")


def _full_precision(device_type: str) -> AbstractContextManager[None]:
    """No autocast, where there is one: it would run the product of distances in half precision."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _squared_distances(z: Tensor) -> Tensor:
    """Between all pairs of rows: (N, D) -> (N, N). Centred first: the expanded square cancels badly far from zero."""
    z = z - z.detach().mean(0)
    norms = z.square().sum(1)
    return (norms[:, None] + norms[None, :] - 2 * z @ z.T).clamp(min=0)


def _mixture(distances: Tensor, bandwidths: Sequence[float] | None) -> Tensor:
    if bandwidths is not None:
        kernels = [torch.exp(distances / (-2 * bandwidth**2)) for bandwidth in bandwidths]
    else:
        median = _median_off_diagonal(distances.detach())
        kernels = [torch.exp(distances / (-2 * factor * median)) for factor in _MIXTURE]
    return torch.stack(kernels).mean(0)


def _median_off_diagonal(distances: Tensor) -> Tensor:
    """Median over pairs of different samples, above zero. Indices, not a mask: a mask would wait for the device."""
    rows, columns = torch.triu_indices(len(distances), len(distances), offset=1, device=distances.device)
    return distances[rows, columns].median().clamp(min=torch.finfo(distances.dtype).tiny ** 0.5)


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))


def _full(t: int, x: Tensor) -> Tensor:
    return torch.full(x.shape[:1], t, dtype=torch.long, device=x.device)


def _noise_like(x: Tensor, generator: Generators) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    noise = torch.empty_like(x)
    for sample, own in zip(noise, generator, strict=True):
        sample.normal_(generator=own)
    return noise


def _sigmoid(logit: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * logit))
