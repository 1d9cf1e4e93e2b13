"""What a model is told beside the noisy sample and the time: class labels, or embedded captions.

Labels are a tensor (N,). Captions carry a mask, so they are an object, with the few operations on the sample axis that
samplers and training steps need. Those work on both: :func:`join` and :func:`choose`.

Shape legend: N samples, L caption tokens, E width of the text encoder, D hidden size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Self = TypeVar("Self", bound="_PerSample")


class _PerSample:
    """A dataclass of tensors (or tuples of tensors, or None) whose first axis is the sample."""

    mask: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.mask.device

    def __getitem__(self: Self, rows: Any) -> Self:
        """Samples chosen by a slice, indices or a mask."""
        return self._map(lambda tensor: tensor[rows])

    def to(self: Self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device; from page-locked memory without waiting, which Lightning does not ask for."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking or tensor.is_pinned()))

    def pin_memory(self: Self) -> Self:
        """The same in page-locked memory, which data loaders ask for."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{name: _apply(function, value) for name, value in values.items()})


@dataclass
class Captions(_PerSample):
    """Embedded captions, padded to a common length.

    Every caption has one visible token at least: of an empty text that is the end-of-text token.
    """

    embeddings: Tensor
    """(N, L, E), in any floating-point type; what stands in padding is never read."""
    mask: Tensor
    """(N, L) bool, True where there is a token."""
    image_size: Tensor | None = None
    """(N, 2) height and width of the image in pixels, for models with micro-conditions; None: that of the sample."""

    def __post_init__(self) -> None:
        if self.embeddings.dim() != 3 or self.mask.shape != self.embeddings.shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(
                f"captions are embeddings (N, L, E) with a boolean mask (N, L), got {tuple(self.embeddings.shape)} "
                f"and a {self.mask.dtype} mask {tuple(self.mask.shape)}"
            )

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.mask.shape[1]

    def padded(self, num_tokens: int) -> Captions:
        """With hidden tokens at the end, up to a length."""
        missing = num_tokens - self.num_tokens
        if missing <= 0:
            return self
        return replace(self, embeddings=F.pad(self.embeddings, (0, 0, 0, missing)), mask=F.pad(self.mask, (0, missing)))


@dataclass
class CaptionKeys(_PerSample):
    """Captions as the cross-attention of one model reads them: constant over a sampling run, at every patch size."""

    keys_values: tuple[Tensor, ...]
    """(N, L, 2 * D) for each block."""
    mask: Tensor
    """(N, L) bool."""
    image_size: Tensor | None = None
    """As in :class:`Captions`."""


Condition: TypeAlias = Tensor | Captions | CaptionKeys
ConditionT = TypeVar("ConditionT", Tensor, Captions, CaptionKeys)


def join(parts: Sequence[ConditionT]) -> ConditionT:
    """One batch out of several; shorter captions get hidden tokens."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))  # type: ignore[arg-type, return-value]
    return _join_objects(list(parts))


def _join_objects(parts: list[Any]) -> Any:
    if isinstance(parts[0], Captions):
        length = max(part.num_tokens for part in parts)
        parts = [part.padded(length) for part in parts]
    values = {field.name: _cat([getattr(part, field.name) for part in parts]) for field in fields(parts[0])}
    return type(parts[0])(**values)


def choose(rows: Tensor, these: ConditionT, those: ConditionT) -> ConditionT:
    """``these`` where ``rows`` is True and ``those`` elsewhere: (N,) bool, N conditions each."""
    if isinstance(these, Tensor):
        return _where(rows, these, those)
    return _choose_objects(rows, these, those)


def _choose_objects(rows: Tensor, these: Any, those: Any) -> Any:
    if isinstance(these, Captions):
        length = max(these.num_tokens, those.num_tokens)
        these, those = these.padded(length), those.padded(length)
    pairs = {field.name: (getattr(these, field.name), getattr(those, field.name)) for field in fields(these)}
    return type(these)(**{name: _where(rows, *pair) for name, pair in pairs.items()})


def _where(rows: Tensor, these: Any, those: Any) -> Any:
    if isinstance(these, tuple):
        return tuple(_where(rows, a, b) for a, b in zip(these, those, strict=True))
    if these is None or those is None:
        return None
    return torch.where(rows.view(-1, *[1] * (these.dim() - 1)), these, those)


def _apply(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(function, value))
    return None if value is None else function(value)


def _cat(values: Sequence[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(map(_cat, zip(*values, strict=True)))
    if any(value is None for value in values):
        return None
    kind = reduce(torch.promote_types, (value.dtype for value in values))
    # autocast to float16 would refuse to join bfloat16 embeddings, or those with others
    with torch.autocast(values[0].device.type, enabled=False):
        return torch.cat([value.to(kind) for value in values])
