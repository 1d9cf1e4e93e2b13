"""The global random generators of all processes, in a checkpoint: Python's, NumPy's, torch's and CUDA's.

What this project draws in training is keyed (:mod:`lightning_modules.draws`) and needs none of them. A user's callback,
data or layer (dropout) may draw from them, and then a resume is exact only if they go on where they were. Each process
has its own. States are tensors and plain numbers: checkpoints are read with ``weights_only=True``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.draws import keyed
from lightning_modules.progress import begun_batches

_PYTHON_VERSION = 3  # of the state of Python's generator, since Python 3.2


def read_generators(device: torch.device) -> dict[str, Any]:
    """The states of this process; CUDA's is that of its own device."""
    _, python, python_gauss = random.getstate()
    _, numpy, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    return {
        "python": {"words": torch.tensor(python), "gauss": python_gauss},
        "numpy": {
            "words": torch.from_numpy(np.asarray(numpy).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(numpy_gauss),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device).cpu() if device.type == "cuda" else None,
    }


def write_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of :func:`read_generators`; CUDA's generator is left alone where the states have none."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((_PYTHON_VERSION, tuple(python["words"].tolist()), python["gauss"]))
    words = numpy["words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def gather_generators(own: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all processes, by rank. All of them must ask."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def restore_generators(
    saved: Sequence[Mapping[str, Any]], device: torch.device, rank: int, world_size: int, key: Sequence[int]
) -> None:
    """Go on with the states of a checkpoint; on another number of processes, with new ones that ``key`` decides.

    Nobody could say whose states those of a process that is new would be, or who goes on with those of one that is
    gone. So all start anew, each with its own, in a way that depends on the run's seed and step only.
    """
    if len(saved) == world_size:
        write_generators(saved[rank], device)
        return
    held = f"those of {len(saved)} processes" if saved else "none"
    rank_zero_warn(
        f"the global random generators start anew: the checkpoint holds {held} and this run has {world_size}; what "
        "training itself draws is keyed by seed, step and sample and goes on exactly, only callbacks, data and layers "
        "that draw from the global generators notice"
    )
    seed = keyed(*key, "generators", rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA's too


class RunGenerators:
    """What becomes of the global generators in a run: kept over its checkpoints, untouched by its validation."""

    def __init__(self) -> None:
        self._loaded: Sequence[Mapping[str, Any]] | None = None
        self._of_step: dict[str, Any] = {}
        self._before_validation: dict[str, Any] = {}

    def load(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Remember the states of a checkpoint, for :meth:`start`."""
        self._loaded = saved

    def start(self, module: LightningModule, key: Sequence[int]) -> None:
        """Go on with them, if training is a resume; the last thing before its first batch."""
        if self._loaded is not None:
            ranks = (module.global_rank, module.trainer.world_size)
            restore_generators(self._loaded, module.device, *ranks, key=key)
        self._loaded = None
        self._before_validation = {}
        self.end_step(module)

    def end_step(self, module: LightningModule) -> None:
        """Remember the states after a step of several micro-batches."""
        if module.trainer.accumulate_grad_batches > 1:
            self._of_step = read_generators(module.device)

    def save(self, module: LightningModule) -> list[dict[str, Any]]:
        """Those of all ranks for a checkpoint.

        Of a step that is not complete, those before it, since it is repeated. In validation, those before that: they
        are put back after it, and one that is broken off is repeated whole.
        """
        progress, accumulated = (
            module.trainer.fit_loop.epoch_loop.batch_progress,
            module.trainer.accumulate_grad_batches,
        )
        is_between = begun_batches(progress.state_dict(), accumulated) > 0
        kept = self._of_step if is_between else self._before_validation
        return gather_generators(kept or read_generators(module.device))

    def enter_validation(self, module: LightningModule) -> None:
        """Whatever draws in it: a run that is resumed after it, and does not repeat it, goes on the same."""
        self._before_validation = read_generators(module.device)

    def leave_validation(self, module: LightningModule) -> None:
        """Put back the states of :meth:`enter_validation`."""
        write_generators(self._before_validation, module.device)
        self._before_validation = {}
