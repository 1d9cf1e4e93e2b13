"""Exponential moving average of what trains: sharded like it, saved with it, used wherever quality is judged.

Lightning's own ``EMAWeightAveraging`` deep-copies the whole module, frozen networks too, and does not support
sharded models; this callback holds one float32 tensor per *trainable* parameter (DESIGN decision 9).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

# Wrappers that compile or checkpoint a submodule insert these into parameter names; an average saved with them must
# load without them, and the other way round.
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")


class EMA(Callback):
    """Keeps ``average = decay * average + (1 - decay) * weights``, updated after each optimizer step.

    An update that falls on a step which a guard left out (``pl_module.step_skipped``) is left out too: the average
    stays as it is, bit for bit. It is counted all the same, as that step is.

    The average is swapped in for validation, test and prediction, and restored afterwards bit for bit. Other
    callbacks that sample at other moments wrap the work in :meth:`swapped`.

    The average is float32 whatever the weights are: at decay 0.9999 an update moves it by 1e-4 of the difference,
    which bfloat16 rounds to nothing. Under FSDP2 each rank averages its own shards. A checkpoint that is one file holds
    full tensors, which only saving gathers; one that is a folder holds the shards, if the strategy ``saves_shards``.
    Both may be resumed on another number of ranks. The average lies in
    ``checkpoint["callbacks"]["EMA"]["average"]``, names as in ``pl_module.named_parameters()``, tensors and plain
    Python only (``weights_only=True`` loads it). A checkpoint saved with ``save_weights_only=True`` has no average.

    Args:
        decay: Weight of the past per optimizer step (0.9999 in DiT and in the paper's Table 4).
        every_n_steps: Update only every so many optimizer steps, with ``decay ** every_n_steps``: the horizon, counted
            in steps, stays the same.
        warmup: Use ``min(decay, (1 + n) / (10 + n))`` at step n, so that a run much shorter than ``1 / (1 - decay)``
            steps forgets its random start.

    Raises:
        ValueError: ``decay`` is outside [0, 1] or ``every_n_steps`` below 1.
    """

    def __init__(self, decay: float = 0.9999, every_n_steps: int = 1, warmup: bool = False) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay is a weight in [0, 1], got {decay}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is at least 1, got {every_n_steps}")
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.warmup = warmup
        self.num_updates = 0
        self._last_step = 0
        self._saves_shards = False
        self._average: dict[str, Tensor] | None = None  # DTensor where the parameter is one
        self._restored: dict[str, Tensor] | None = None  # of a checkpoint, until the parameters are placed
        self._raw: dict[str, Tensor] | None = None  # local raw weights while the average is swapped in

    @property
    def average(self) -> Mapping[str, Tensor]:
        """Averaged value by parameter name; empty before training."""
        return self._average or {}

    @property
    def resume_settings(self) -> dict[str, Any]:
        """What a resumed run must have as it was, to be the same."""
        return {"decay": self.decay, "every_n_steps": self.every_n_steps, "warmup": self.warmup}

    def decay_at(self, num_updates: int) -> float:
        """Decay of the update that follows ``num_updates`` earlier ones."""
        step = num_updates * self.every_n_steps
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        return float(decay**self.every_n_steps)

    @torch.no_grad()
    def update(self, module: nn.Module, skipped: Tensor | None = None) -> None:
        """Move the average towards the current trainable parameters of ``module``.

        Args:
            module: whose parameters they are.
            skipped: () float32, 1 to leave this update out; on a GPU nobody waits for it. None takes it.
        """
        parameters = trainable_parameters(module)
        if self._average is None:
            self._average = {name: _float32_copy(parameter) for name, parameter in parameters.items()}
        _check_names(self._average, parameters)
        averages = [_local(self._average[name]) for name in parameters]
        weights = [_local(parameter).float() for parameter in parameters.values()]
        _move(averages, weights, 1.0 - self.decay_at(self.num_updates), skipped)
        self.num_updates += 1

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Run a block with the averaged weights in ``module``; the raw ones are back after it, exceptions included.

        Nested use is allowed (sampling inside validation). Without an average yet, the block sees the raw weights.
        """
        if self._raw is not None or not self._place(module):
            yield
            return
        self._swap_in(module)
        try:
            yield
        finally:
            self._swap_out(module)

    def state_dict(self) -> dict[str, Any]:
        """Full float32 averages and two counters.

        Every rank must call it, as Lightning does: sharded averages are gathered, and rank 0, which writes the file,
        is the only one to keep them. Where each rank writes its shards, the averages are those of training.
        """
        if self._average is None:
            return {} if self._restored is None else self._state(dict(self._restored))
        if self._saves_shards:
            return self._state(dict(self._average))
        return self._state({name: _full(value) for name, value in self._average.items()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; the tensors are placed when the parameters are."""
        if not state_dict:
            return
        self._restored = state_dict["average"]
        self.num_updates = state_dict["num_updates"]
        self._last_step = state_dict["last_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit starts a new average (a checkpoint is loaded after this hook)."""
        self._saves_shards = getattr(trainer.strategy, "saves_shards", False)
        if stage == "fit":
            self._average, self._restored, self._raw = None, None, None
            self.num_updates, self._last_step = 0, 0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_fit_start: strategies that restore after their set-up (FSDP2) load the checkpoint in between.
        self._start(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # global_step counts optimizer steps: it stands still while gradients accumulate.
        if trainer.global_step > self._last_step and trainer.global_step % self.every_n_steps == 0:
            self.update(pl_module, getattr(pl_module, "step_skipped", None))
            self._last_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the raw weights even in the middle of validation, where SLURM's pre-emption signal may fall."""
        if self._raw is None:
            return
        self._write_raw(pl_module)
        weights = trainer.strategy.lightning_module_state_dict()
        checkpoint["state_dict"] = {  # a frozen base is not overwritten, and need not be there twice
            name: value.clone() if _plain_name(name) in self._raw else value for name, value in weights.items()
        }
        self._write_average(pl_module)

    def _state(self, average: dict[str, Tensor]) -> dict[str, Any]:
        return {"average": average, "num_updates": self.num_updates, "last_step": self._last_step}

    @torch.no_grad()
    def _start(self, module: nn.Module) -> None:
        if not self._place(module):
            parameters = trainable_parameters(module)
            self._average = {name: _float32_copy(parameter) for name, parameter in parameters.items()}

    @torch.no_grad()
    def _place(self, module: nn.Module) -> bool:
        """Turn restored tensors into averages placed like the parameters; False if there is no average at all."""
        if self._restored is not None:
            parameters = trainable_parameters(module)
            _check_names(self._restored, parameters)
            self._average = {name: _placed_like(self._restored[name], p) for name, p in parameters.items()}
            self._restored = None
        return self._average is not None

    def _enter(self, module: nn.Module) -> None:
        if self._raw is None and self._place(module):
            self._swap_in(module)

    def _leave(self, module: nn.Module) -> None:
        if self._raw is not None:
            self._swap_out(module)

    @torch.no_grad()
    def _swap_in(self, module: nn.Module) -> None:
        parameters = trainable_parameters(module)
        _check_names(self.average, parameters)
        self._raw = {name: _local(parameter).clone() for name, parameter in parameters.items()}
        self._write_average(module)

    def _swap_out(self, module: nn.Module) -> None:
        self._write_raw(module)
        self._raw = None

    def _write_average(self, module: nn.Module) -> None:
        _write(module, self.average)

    def _write_raw(self, module: nn.Module) -> None:
        assert self._raw is not None
        _write(module, self._raw)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name without wrapper prefixes, in their sharded form under FSDP2.

    FSDP2 leaves its root unsharded after a forward without backward. What ``named_parameters`` yields then is the
    gathered copy: reading it is a stale value, writing it is lost. Hence the reshard before every access.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()
    return {_plain_name(name): p for name, p in module.named_parameters() if p.requires_grad}


def _plain_name(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def _move(averages: list[Tensor], weights: list[Tensor], share: float, skipped: Tensor | None) -> None:
    """Give the weights their share in the averages, in place; none if it is skipped."""
    if skipped is None:
        torch._foreach_lerp_(averages, weights, share)
    elif skipped.device.type != "cpu":  # one kernel a tensor instead of one for many: less than waiting for the device
        torch._foreach_lerp_(averages, weights, [share * (1 - skipped)] * len(averages))
    elif not skipped:
        torch._foreach_lerp_(averages, weights, share)


@torch.no_grad()
def _write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in trainable_parameters(module).items():
        _local(parameter).copy_(_local(values[name]))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing storage. Call it under ``no_grad``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _float32_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True)


def _full(value: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if torch.distributed.get_rank() == 0 else torch.empty(0)


def _placed_like(full: Tensor, parameter: Tensor) -> Tensor:
    if full.shape != parameter.shape:
        raise ValueError(f"the saved EMA has a tensor of shape {tuple(full.shape)} for a parameter of shape "
                         f"{tuple(parameter.shape)}; load a checkpoint of this model")  # fmt: skip
    if isinstance(full, DTensor):  # each rank has read its shards
        return full.redistribute(placements=parameter.placements).to(torch.float32)  # type: ignore[attr-defined]
    value = full.to(parameter.device, torch.float32, copy=True)
    if isinstance(parameter, DTensor):
        # Every rank has read the same file: no rank needs to send its copy to the others.
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def _check_names(average: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    differing = sorted(average.keys() ^ parameters.keys())
    if differing:
        raise ValueError(
            f"the EMA and the model's trainable parameters differ in {len(differing)} names, the first is "
            f"{differing[0]!r}; do not freeze or add parameters during a fit, and resume with the same recipe"
        )
