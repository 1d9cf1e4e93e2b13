"""Of a sharded model one process of the job reads the weights, and the others are told what they need of it.

If each of the eight processes of a node read a model of 14 B parameters in float32 before it kept its shard, the node
would need 450 GB of host memory and eight times the bandwidth of its file system; so it is 56 GB and once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from flexidit.checkpoint import build

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer
    from lightning_modules.settings import TargetSettings

Value = TypeVar("Value")

_TOLD = (FileNotFoundError, OSError, ValueError)
"""Kinds of errors that users are told in one sentence."""


def read_once(strategy: Strategy | None, compute: Callable[[], Value]) -> Value:
    """What ``compute`` gives; if the model is to be sharded, what it gives on rank 0.

    Raises:
        Exception: of ``compute``, on every rank: the others would wait for rank 0 until they are killed.
    """
    return on_rank_zero(strategy, compute) if isinstance(strategy, ModelParallelStrategy) else compute()


def on_rank_zero(strategy: Strategy, compute: Callable[[], Value]) -> Value:
    """What ``compute`` gives on rank 0, on all.

    Raises:
        Exception: of ``compute``, on every rank: the others would wait for rank 0 until they are killed.
    """
    value: Any = None
    error: Exception | None = None
    if strategy.is_global_zero:
        try:
            value = compute()
        except Exception as raised:
            error = raised
    value, told = strategy.broadcast((value, None if error is None else _sendable(error)))
    if told is not None:
        raise error or told
    return value


def read_target(settings: TargetSettings, strategy: Strategy | None) -> tuple[FlexiTransformer, str | None]:
    """The target of a run, and where its base is; if it is to be sharded, on the meta device except on rank 0.

    Raises:
        ValueError, OSError: settings or files that cannot be used; on every rank.
    """
    targets = []

    def read() -> tuple[object, torch.dtype, str | None]:
        target = settings.build()
        targets.append(target)
        return target.config, next(target.parameters()).dtype, settings.source_of_base(target)

    config, dtype, source = read_once(strategy, read)
    if targets:
        return targets[0], source
    with torch.device("meta"):
        return build(config).to(dtype).train(), source  # type: ignore[arg-type]


def device_of(target: FlexiTransformer) -> AbstractContextManager[object]:
    """Makes new tensors without data where the target has none."""
    return torch.device("meta") if next(target.parameters()).is_meta else nullcontext()


def _sendable(error: Exception) -> Exception:
    """The same sentence in an error that survives being sent."""
    kind = next((kind for kind in _TOLD if isinstance(error, kind)), RuntimeError)
    return kind(str(error))
