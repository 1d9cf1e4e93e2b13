"""Numbers that are looked up by step index, on whatever device asks.

Shape legend: N batch, K tables, S steps, ... latent axes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class StepTables:
    """Named tables of one number a step.

    They are float64 and live outside any module, on purpose: as buffers they would lose their precision in
    ``module.to(torch.bfloat16)`` and their content in ``to_empty`` after a start on the meta device. They are copied
    once to each device that asks (later calls do not synchronise with it), and each value is cast where it is used: to
    the dtype of the latents, but at least float32. So half-precision latents give float32 results.

    Step indices are not range-checked, since this would synchronise with the device: they must lie in ``0 .. S - 1``.
    """

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        """``rows`` are (S,) float64, on the CPU."""
        # An inference tensor kept here would refuse every later backward.
        with torch.inference_mode(False), torch.no_grad():
            self._rows = {name: index for index, name in enumerate(rows)}
            self._tables = torch.stack(list(rows.values()))  # (K, S)
        self._tables_on: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables_on": {}}  # the copies belong to this process and its devices

    def lookup(self, name: str, t: Tensor) -> Tensor:
        """The values of a table at step indices: (N,) -> (N,), float64 where the device has that."""
        return self._at(t.device)[self._rows[name]][t]

    def coefficient(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """One value per sample, shaped to multiply ``x`` (N, ...): (N,) -> (N, 1, ...).

        Raises:
            ValueError: not one integer step index for each sample.
        """
        if t.shape != x.shape[:1] or t.is_floating_point():
            raise ValueError(
                f"t holds one integer step index for each of the {x.shape[0]} samples, got {tuple(t.shape)} {t.dtype}"
            )
        values = self.lookup(name, t).to(torch.promote_types(x.dtype, torch.float32))
        return values.view(-1, *(1 for _ in x.shape[1:]))

    def _at(self, device: torch.device) -> Tensor:
        if device not in self._tables_on:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            with torch.inference_mode(False):
                self._tables_on[device] = self._tables.to(device, dtype)
        return self._tables_on[device]
