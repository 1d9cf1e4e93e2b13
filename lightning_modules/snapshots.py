"""Copies of a state on the host, which stay as they are while training changes what was copied."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Snapshots:
    """Copies of a state on the host, each in the memory of the one before: new memory takes five times as long."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._copies: dict[int, Tensor] = {}
        self._num_used = 0

    def take(self, state: Any) -> Any:
        """All its containers and tensors; a tensor that is there twice is copied once. The copy before is lost.

        Of a sharded tensor this process's part is copied, and is said to be that part.
        """
        self._copies, self._num_used = {}, 0
        with torch.no_grad():
            copied = self._copy(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the next step writes to what is being copied
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._copies:
                self._copies[id(value)] = self._copy_tensor(value.detach())
            return self._copies[id(value)]
        if isinstance(value, dict):
            copied = copy(value)  # a state dict is an OrderedDict with an attribute
            copied.update({key: self._copy(item) for key, item in value.items()})
            return copied
        if isinstance(value, (list, tuple)):
            items = [self._copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return self._next_buffer(tensor).copy_(tensor, non_blocking=True)
        part = self._copy_tensor(tensor.to_local())
        # Not DTensor.from_local: that would send the part back to the mesh's device.
        return DTensor(part, tensor._spec, requires_grad=False)

    def _next_buffer(self, tensor: Tensor) -> Tensor:
        """The memory that this tensor had in the last copy, if states are alike."""
        number, self._num_used = self._num_used, self._num_used + 1
        if number < len(self._buffers):
            buffer = self._buffers[number]
            if (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype):
                return buffer
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._buffers[number : number + 1] = [buffer]
        return buffer
