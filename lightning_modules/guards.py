"""Steps that would ruin a run are left out, on all ranks together; steps that look unusual are named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_modules.gradient_history import GradientHistory
from lightning_modules.gradients import leave_out_step, leaves_step_to_device, poison
from lightning_modules.step_records import LeftOut, StepRecord, describe

if TYPE_CHECKING:
    from lightning_modules.base import DiffusionModule


_RECORD = "skipped_steps.jsonl"


class DivergedError(ValueError):
    """A run whose steps are no longer finite; the message is one sentence."""


class StepGuard(Callback):
    """Leaves out optimizer steps whose loss or gradient is not finite, counts and names them, and ends a hopeless run.

    Every training module of this package has one; put another into ``trainer.callbacks`` to change its numbers.

    *A step that is left out* changes neither weights nor moments nor their counters nor the average
    (:class:`callbacks.ema.EMA`), on any rank, bit for bit. It takes its number all the same: the schedule of the
    learning rate, patch sizes, draws and data go on as if it had been taken. So all that a resume needs is in the
    checkpoint anyway, and a run that was resumed leaves out the same steps.

    No rank asks another: a loss that is not finite makes all gradients of its rank nan (:func:`~lightning_modules.
    gradients.poison`), these are summed like any other, and the norm of the sum, which clipping needs as well, is the
    same everywhere. No host waits for its device: a fused optimizer reads the verdict there, and the host a step later
    (:mod:`lightning_modules.step_records`). Other optimizers than fused ones are what CPUs and loss scalers have.

    All samples of a step that was left out are named in ``skipped_steps.jsonl`` (trainer.default_root_dir), the first
    of them in a warning. Logged are ``train/grad_norm`` at the trainer's logging steps and, when they grow, the counts
    ``train/skipped_steps`` and ``train/grad_norm_spikes``, the latter with ``train/grad_norm_spike``, in medians of the
    norms before.

    Args:
        max_in_a_row: More steps in a row than these end the run, with a checkpoint of its last good state: what it was
            before them, with the counters of now. Those that a loss scaler (16-mixed) answers by lowering its scale do
            not count.
        spike_factor: A gradient norm of more than so many medians of the last ones is a spike. Its step is taken.
        spike_window: Norms that the median is of, for each patch size.
        warn_every_n_steps: Spikes are warned of at most once in so many steps.

    Raises:
        ValueError: ``max_in_a_row``, ``spike_window`` or ``warn_every_n_steps`` is below 1, or ``spike_factor`` not
            above 1.
    """

    def __init__(
        self,
        max_in_a_row: int = 10,
        spike_factor: float = 5.0,
        spike_window: int = 100,
        warn_every_n_steps: int = 100,
    ) -> None:
        for name, value in (
            ("max_in_a_row", max_in_a_row),
            ("spike_window", spike_window),
            ("warn_every_n_steps", warn_every_n_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} is at least 1, got {value}")
        if not spike_factor > 1:
            raise ValueError(f"spike_factor is above 1, got {spike_factor}")
        self.max_in_a_row, self.warn_every_n_steps = max_in_a_row, warn_every_n_steps
        self.history = GradientHistory(spike_factor, spike_window)
        self.num_skipped, self.in_a_row, self.num_spikes = 0, 0, 0
        self._next_warning, self._num_unwarned = 0, 0
        self._names: list[Sequence[str]] = []  # of the step in progress, by micro-batch
        self._losses: list[Tensor] = []
        self._unread: list[StepRecord] = []  # of this rank
        self._left_out: list[LeftOut] = []  # read, and not yet told of
        self._lag = 0  # steps that the device may be behind when a record is read

    @classmethod
    def of(cls, trainer: Any) -> StepGuard | None:
        """The guard of a run."""
        return next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        names = batch.get("names") if isinstance(batch, Mapping) else None
        self._names.append(names or [f"batch {batch_idx} of the epoch"])

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._names, self._losses = self._names[-1:], []  # of a step that was never judged

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        poison(loss)
        self._losses.append(loss.detach())

    def judge(self, module: DiffusionModule, optimizer: Optimizer, norm: Tensor) -> Tensor:
        """Have the optimizer's next step left out if the norm of its gradients is not finite.

        Returns:
            () float32, 1 if it will be and else 0, on the device.
        """
        skipped = 1 - norm.isfinite().float()
        step, patch_size = module.global_step, module.patch_size_at(module.global_step).name
        self._unread.append(StepRecord.of(step, patch_size, self._names, norm, self._losses))
        self._names, self._losses = [], []
        self._lag = int(leaves_step_to_device(optimizer))
        leave_out_step(optimizer, skipped)
        return skipped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._read(trainer, len(self._unread) - self._lag)
        self._tell(trainer)
        if self.in_a_row > self.max_in_a_row:
            self._end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(trainer, len(self._unread))
        self._tell(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Name the steps that the checkpoint counts, which the run that goes on from it would not do.

        Every rank must call it, as Lightning does, right after :meth:`state_dict`.
        """
        self._tell(trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit counts anew (a checkpoint is loaded after this hook)."""
        if stage == "fit":
            self._trainer = trainer
            self.load_state_dict({"skipped": 0, "in_a_row": 0, "spikes": 0, "next_warning": 0, "unwarned": 0})
            self._names, self._losses, self._unread, self._left_out = [], [], [], []

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the norms of the last steps; plain values. Waits for the device.

        Every rank must call it, as Lightning does: all learn at the same time how a step went.
        """
        if self._unread:
            self._read(self._trainer, len(self._unread))
        return {
            "skipped": self.num_skipped,
            "in_a_row": self.in_a_row,
            "spikes": self.num_spikes,
            "next_warning": self._next_warning,
            "unwarned": self._num_unwarned,
            "norms": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self.num_spikes = state_dict["spikes"]
        self._next_warning, self._num_unwarned = state_dict["next_warning"], state_dict["unwarned"]
        self.history.load_state_dict(state_dict.get("norms", {}))

    def _read(self, trainer: Trainer, count: int) -> None:
        """Learn how the oldest unread steps went; the same ones, at the same time, on all ranks."""
        for record in self._unread[: max(0, count)]:
            norm, losses = record.read()
            if isfinite(norm):
                self.in_a_row = 0
                self._judge_norm(trainer, record, norm)
            else:
                self.num_skipped += 1
                self.in_a_row += not _is_scaling_down(trainer)
                self._left_out.append(LeftOut.of(record, losses))
        del self._unread[: max(0, count)]

    def _judge_norm(self, trainer: Trainer, record: StepRecord, norm: float) -> None:
        ratio = self.history.add(record.patch_size, norm)
        if ratio is None:
            return
        self.num_spikes += 1
        self._num_unwarned += 1
        _log(trainer, {"train/grad_norm_spikes": self.num_spikes, "train/grad_norm_spike": ratio}, record.step)
        if record.step >= self._next_warning:
            others = f", and {self._num_unwarned - 1} since the last warning" if self._num_unwarned > 1 else ""
            rank_zero_warn(
                f"the gradient of step {record.step} at patch size {record.patch_size} has the norm {norm:.3g}, "
                f"{ratio:.1f} times the median of those before ({self.num_spikes} spikes so far{others}): the step was "
                "taken; if the loss suffers, clip gradients (trainer.gradient_clip_val) or lower optimizer.lr"
            )
            self._next_warning, self._num_unwarned = record.step + self.warn_every_n_steps, 0

    def _tell(self, trainer: Trainer) -> None:
        """Name the steps that were left out, with what each rank knows of them."""
        for number, left in enumerate(self._left_out, self.num_skipped - len(self._left_out) + 1):
            everywhere = _of_all_ranks(left, trainer.world_size)
            _log(trainer, {"train/skipped_steps": number}, left.step)
            _write(trainer, everywhere)
            rank_zero_warn(
                f"step {left.step} was left out, the {_ordinal(number)} of this run: {describe(everywhere)}; "
                f"{_RECORD} in {trainer.default_root_dir} names all samples"
            )
        self._left_out = []

    def _end(self, trainer: Trainer) -> None:
        count, self.in_a_row = self.in_a_row, 0  # who resumes gets as many tries again
        if not _has_finite_weights(trainer):
            raise DivergedError(
                f"{count} steps in a row were not finite, and a step before them has left weights that are not either, "
                "so nothing was saved: go on from an earlier checkpoint with --ckpt_path and a lower optimizer.lr, or "
                "clip gradients"
            )
        path = _folder(trainer) / f"good_step={trainer.global_step}.ckpt"
        if not _save(trainer, path):
            raise DivergedError(
                f"{count} steps in a row were not finite and were left out, the run has diverged, and its last good "
                "state could not be saved: go on from an earlier checkpoint with --ckpt_path, with room to write to"
            )
        raise DivergedError(
            f"{count} steps in a row were not finite and were left out, the run has diverged: its last good state is "
            f"in {path}; lower optimizer.lr, clip gradients or see to the samples named above, and go on with "
            f"--ckpt_path {path}"
        )


def _save(trainer: Trainer, path: Path) -> bool:
    """Whether a checkpoint is on disk then, for all ranks; one that is written in the background is waited for."""
    before = _written_at(path)  # by an earlier start
    trainer.save_checkpoint(path)
    wait = getattr(trainer.strategy.checkpoint_io, "wait", None)
    with suppress(OSError):
        if wait is not None:
            wait()
    return bool(trainer.strategy.broadcast(_written_at(path) not in (None, before)))


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _is_scaling_down(trainer: Trainer) -> bool:
    """Whether a loss scaler still has something to lower, which is its way to find the right scale."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1


@torch.no_grad()
def _has_finite_weights(trainer: Trainer) -> bool:
    """Of what trains, on all ranks."""
    for module in trainer.lightning_module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what is gathered may be older than the shards
    parameters = (p for p in trainer.lightning_module.parameters() if p.requires_grad)
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return trainer.strategy.reduce_boolean_decision(all(bool(part.isfinite().all()) for part in parts), all=True)


def _of_all_ranks(left: LeftOut, world_size: int) -> list[LeftOut]:
    if world_size == 1:
        return [left]
    everywhere: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everywhere, left)
    return everywhere


def _log(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Straight to the loggers: ``self.log`` knows the present step only, and drops what is off its interval."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        logger.log_metrics(dict(values), step=step)


@rank_zero_only
def _write(trainer: Trainer, everywhere: Sequence[LeftOut]) -> None:
    ranks = [{"bad": list(left.bad), "samples": list(left.samples)} for left in everywhere]
    line = {"step": everywhere[0].step, "patch_size": everywhere[0].patch_size, "ranks": ranks}
    with (
        suppress(OSError),
        (Path(trainer.default_root_dir) / _RECORD).open("a") as file,
    ):  # a full disk ends no run here
        file.write(json.dumps(line) + "\n")


def _folder(trainer: Trainer) -> Path:
    """Where the run's checkpoints are."""
    folders = (getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks)
    return Path(next((folder for folder in folders if folder), trainer.default_root_dir))


def _ordinal(number: int) -> str:
    """Example: 1st, 2nd, 11th, 23rd."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if 10 < number % 100 < 14 else ending}"
