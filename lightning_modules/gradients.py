"""What is done with gradients between backward and the optimizer's step: measured once, clipped, or dropped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, the same on all ranks: (), on the device.

    Gradients that DDP has summed are the same everywhere; of sharded ones each rank measures its part, and the parts
    are summed. A gradient that is not finite on one rank makes it nan or inf on all of them.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None, algorithm: str | None) -> Tensor:
    """Scale gradients down to a norm, or clamp each of their values ("value"), or leave them without a limit.

    Returns:
        The norm that they had, see :func:`gradient_norm`.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = gradient_norm(parameters)
    if limit and algorithm == "value":
        nn.utils.clip_grad_value_(parameters, float(limit))
    elif limit:
        nn.utils.clip_grads_with_norm_(parameters, float(limit), norm)
    return norm


def poison(loss: Tensor) -> None:
    """Have backward give nan to every parameter if the loss is not finite; exactly what it gives otherwise.

    Summed over ranks and micro-batches like any gradient, nan tells every rank of it, without a message of its own.
    """
    value = loss.detach()
    factor = torch.where(value.isfinite(), torch.ones_like(value), torch.full_like(value, torch.nan))
    loss.register_hook(lambda gradient: gradient * factor)


def leaves_step_to_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer's kernel itself can leave out a step, told by a flag on the device: the fused ones do."""
    return all(group.get("fused") for group in optimizer.param_groups)


def leave_out_step(optimizer: Optimizer, skipped: Tensor) -> None:
    """Make the optimizer's next step change nothing, neither weights nor moments nor their counters, if flagged.

    A fused kernel reads the flag on the device, as it does for a loss scaler, and nobody waits. For others the flag is
    read here, which is free on a CPU, and gradients are taken away: what has no gradient is passed over.

    Args:
        optimizer: about to step.
        skipped: () float32, 1 to leave the step out and 0 to take it.
    """
    if leaves_step_to_device(optimizer):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
    elif skipped:
        optimizer.zero_grad(set_to_none=True)
