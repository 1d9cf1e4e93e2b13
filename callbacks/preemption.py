"""A fit that is to be preempted ends with a checkpoint: at the end of a step, on all ranks together, and in time.

Facts about Lightning 2.6 that shape this file. It saves inside the signal handler, wherever each rank happens to be, in
the middle of a step or of a collective. It looks at the signals of rank 0 alone, and reads a number from the device
before each batch to do so, which makes the host wait for the device each time. Its SIGTERM handler starts a collective
of its own. So its handlers and that question are replaced; its loops still leave where they would have left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.breaking_off import BrokenOffError, Finishes, Pace
from callbacks.due_validation import repeat_validation

PREEMPTED, INTERRUPTED = 75, 130
"""Exit codes. 75 is ``EX_TEMPFAIL`` of sysexits.h: try again, the run goes on. 130 is what shells give for Ctrl+C."""

_DOUBLE_PRESS = 1.0
"""Seconds within which a second Ctrl+C is the same one: launchers pass on what the terminal has sent already."""


class Preemption(Callback):
    """Notes signals, and ends the fit at the end of the step: a checkpoint, then exit code 75 (130 after Ctrl+C).

    A signal may reach one rank or all. After each optimizer step the ranks ask one another on the CPU whether any has
    got one: an all-reduce of one number over gloo, which does not wait for the device. (It also notices within that
    step that a rank has died, where NCCL would wait until its timeout.) If so, all write the checkpoint ``last`` of the
    run's ``ModelCheckpoint`` and leave; ``--ckpt_path last`` continues as if nothing had happened.

    While gradients accumulate, the step is ended first. In validation the ranks ask after each batch that all of them
    have; the checkpoint is that of the step before, and the validation is repeated whole by the run that continues.
    Sampling for pictures and metrics is broken off before the next call of the model (:meth:`heed`); the run that
    continues draws the picture, and measures what was not measured yet. After the last step that is all that is broken
    off, and the run that continues does only what is lacking. Before the first step, where there is nothing to save,
    signals act as if there were no callback.

    Under SLURM with ``SLURMEnvironment(auto_requeue=True)`` the environment's requeue signal, USR1, also has the job
    requeued, by rank 0, after the checkpoint. SIGTERM does not: ``scancel`` sends it too.

    A second Ctrl+C stops at once, without a checkpoint.

    Args:
        signals: What to heed, by name; an empty list heeds nothing. SLURM's requeue signal is heeded in any case.
        every_n_steps: Ask only after every so many optimizer steps: with hundreds of ranks and short steps, that is
            cheaper (the time of an all-reduce of gloo grows with their number: 5 ms for 16 on two cores).

    Raises:
        ValueError: a signal of no such name, or ``every_n_steps`` below 1.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGINT"), every_n_steps: int = 1) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise ValueError(f"there is no signal {unknown[0]}; give names such as SIGTERM, SIGUSR1, SIGINT")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is at least 1, got {every_n_steps}")
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.every_n_steps = every_n_steps
        self._noted = _NotedSignals()
        self._group: Any = None
        self._step = self._first_step = self._leaving = 0
        self._has_begun = False
        self._shared_batches = self._num_validated = 0
        self._breaks_validation_off = self.breaks_picture_off = False

    @classmethod
    def of(cls, trainer: Any) -> Preemption | None:
        """That of a fit."""
        if getattr(getattr(trainer, "state", None), "fn", None) != TrainerFn.FITTING:
            return None
        return next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)

    def state_dict(self) -> dict[str, Any]:
        return {"validation_broken_off": self._breaks_validation_off, "picture_broken_off": self.breaks_picture_off}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._breaks_validation_off = state_dict["validation_broken_off"]
        self.breaks_picture_off = state_dict.get("picture_broken_off", False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING.value:
            return
        # Comes last, so that what it saves holds what the others do at the end of the step.
        trainer.callbacks = [*(c for c in trainer.callbacks if c is not self), self]  # type: ignore[attr-defined]
        self._noted, self._leaving, self._has_begun = _NotedSignals(), 0, False
        trainer._signal_connector = _SignalNotes(trainer, self._watched(trainer), self._noted)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        loop = trainer.fit_loop
        loop.run = partial(self._run, trainer, partial(type(loop).run, loop))  # type: ignore[method-assign]
        if trainer.world_size > 1:
            timeout = getattr(trainer.strategy, "_timeout", None)
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(trainer.fit_loop).pop("run", None)
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None

    def is_continued_here(self, trainer: Trainer) -> bool:
        """Whether the weights are still those of the checkpoint that this run continues from."""
        return trainer.global_step == self._first_step > 0

    def heed(self, trainer: Trainer, pace: Pace) -> None:
        """End what takes long, if any rank has been sent a signal. All ranks must call this, equally often.

        Args:
            trainer: of the fit.
            pace: how often they ask one another; a new one where something begins.

        Raises:
            BrokenOffError: on all ranks at the same call, and at each that follows.
        """
        if not self._leaving and self._group is None:
            self._leaving = self._noted.signum
        elif not self._leaving and pace.is_due():
            self._leaving, milliseconds = self._highest(self._noted.signum, pace.elapsed())
            pace.adapt(milliseconds)
        if self._leaving:
            self.breaks_picture_off |= not trainer.validating
            raise BrokenOffError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_begun = True
        self._leave_if_broken_off(trainer)
        repeat_validation(trainer, was_broken_off=self._breaks_validation_off)
        self._breaks_validation_off = self.breaks_picture_off = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients accumulate
        self._step = trainer.global_step
        if self._step == trainer.max_steps:
            return
        if self._step % self.every_n_steps == 0 and not self._leaving:
            [self._leaving] = self._highest(self._noted.signum)
        self._save_and_agree(trainer)  # Lightning's loops leave when the step has been logged

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_if_broken_off(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self._noted.agreed:
            raise SIGTERMException
        self._num_validated, counts = 0, trainer.num_sanity_val_batches if trainer.sanity_checking else None
        count = sum(trainer.num_val_batches if counts is None else counts)  # infinite where it is not known
        [shared] = self._highest(-int(count) if count < 2**31 else 0)
        self._shared_batches = -shared

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._num_validated += 1
        if trainer.state.fn != TrainerFn.FITTING or self._num_validated > self._shared_batches:
            return
        if trainer.global_step == trainer.max_steps:
            return  # who continues a run at its end validates no more
        [self._leaving] = self._highest(self._noted.signum)
        self._break_validation_off(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step != trainer.max_steps:
            self._break_validation_off(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        signum = self._noted.agreed
        if not isinstance(exception, SIGTERMException) or not signum:
            return
        exception.code = INTERRUPTED if signum == signal.SIGINT else PREEMPTED
        rank_zero_info(
            f"stopped by {signal.Signals(signum).name} at step {trainer.global_step}: the same command with "
            "--ckpt_path last continues"
        )
        for logger in trainer.loggers:
            logger.finalize("preempted")
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        if signum == environment.requeue_signal and trainer.is_global_zero:
            _requeue_if_it_helps(trainer)

    def _watched(self, trainer: Trainer) -> list[signal.Signals]:
        environment = trainer._accelerator_connector.cluster_environment
        extra = [environment.requeue_signal] if isinstance(environment, SLURMEnvironment) else []
        return [*dict.fromkeys([*self.signals, *(signum for signum in extra if signum is not None)])]

    def _highest(self, *values: int) -> list[int]:
        """The largest of all ranks' numbers, of each."""
        if self._group is None:
            return list(values)
        told = torch.tensor(values)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self._group)
        return [int(value) for value in told]

    def _run(self, trainer: Trainer, run: Callable[[], None]) -> None:
        """Lightning's loop; it does nothing where a run has done its last step, and does not end it either."""
        self._step = self._first_step = trainer.global_step
        run()
        if self._has_begun or not self.is_continued_here(trainer):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Finishes):
                callback.finish(trainer, trainer.lightning_module)
        self._leave_if_broken_off(trainer)

    def _break_validation_off(self, trainer: Trainer) -> None:
        if self._leaving:
            self._breaks_validation_off = not trainer.sanity_checking
            self._leave_if_broken_off(trainer)

    def _leave_if_broken_off(self, trainer: Trainer) -> None:
        self._save_and_agree(trainer)
        if self._leaving:
            raise SIGTERMException

    def _save_and_agree(self, trainer: Trainer) -> None:
        if self._leaving:
            self._save(trainer)
            self._noted.agreed = self._leaving

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step > self._first_step:  # else the run that it continues has saved
            save_last(trainer)
            _finish_writing(trainer)
            self._highest(0)  # none leaves before: launchers end the others then, and one may still be writing


class _NotedSignals:
    """The signal that this rank has been sent, and the one that all ranks have agreed to heed; 0: none."""

    def __init__(self) -> None:
        self.signum = self.agreed = 0
        self._interrupted_at = -float("inf")

    def note(self, signum: int) -> None:
        if signum == signal.SIGINT:
            self._note_interrupt()
        # SIGTERM has the greatest number of the usual ones: nobody requeues a job that is being cancelled.
        self.signum = max(self.signum, signum)

    def _note_interrupt(self) -> None:
        now = time.monotonic()
        if self.signum == signal.SIGINT and now - self._interrupted_at > _DOUBLE_PRESS:
            raise KeyboardInterrupt
        if self.signum == 0:
            rank_zero_info("stopping with a checkpoint at the end of this step; Ctrl+C again stops at once, without")
            self._interrupted_at = now


class _SignalNotes(_SignalConnector):
    """Lightning's keeper of signal handlers, with handlers that only take notes."""

    def __init__(self, trainer: Trainer, watched: Sequence[signal.Signals], noted: _NotedSignals) -> None:
        self._watched, self._noted = watched, noted
        super().__init__(trainer)

    @property
    def received_sigterm(self) -> bool:  # type: ignore[override]
        """Lightning's loops leave where this is True: on all ranks at the same step."""
        return self._noted.agreed > 0

    @received_sigterm.setter
    def received_sigterm(self, value: bool) -> None:
        """Nothing: it is the ranks' common answer."""

    def register_signal_handlers(self) -> None:
        self._original_handlers = self._get_current_signal_handlers()
        for signum in self._watched:
            self._register_signal(signum, lambda number, _: self._noted.note(number))


def save_last(trainer: Trainer) -> None:
    """Write the checkpoint that ``--ckpt_path last`` finds, unless it is of this step already. All ranks call it."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    saver = next((saver for saver in savers if saver.save_last), None)
    if saver is None:
        rank_zero_warn("no checkpoint is written at this signal: that takes a ModelCheckpoint with save_last: true")
        return
    if saver._last_global_step_saved == trainer.global_step:
        return
    # Through the callback: it must know the file as its own, or it would write the next one beside it.
    metrics = saver._monitor_candidates(trainer)
    if saver.save_last == "link" and saver.save_top_k != 0:
        saver._save_checkpoint(trainer, saver.format_checkpoint_name(metrics, "preempted"))  # one, however often
    saver._save_last_checkpoint(trainer, metrics)


def _finish_writing(trainer: Trainer) -> None:
    """Wait for what is written in the background: a job that asks to be requeued is ended at once."""
    wait = getattr(trainer.strategy.checkpoint_io, "wait", None)
    if wait is None:
        return
    try:
        wait()
    except OSError as error:  # of rank 0 only, which must not leave the others alone
        rank_zero_warn(f"the checkpoint of this signal could not be saved: {error}")


def _requeue_if_it_helps(trainer: Trainer) -> None:
    """Not where every start would do the same work again for ever."""
    if any(getattr(callback, "saves_nothing", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        rank_zero_warn(
            "the job is not requeued, since not one checkpoint could be saved: make room, and submit it again"
        )
        return
    requeue()


def requeue() -> None:
    """Ask SLURM to put this job back into its queue, with the same number; it ends the present start of the job."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        result = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
        complaint = result.stderr.strip() if result.returncode else None
    except OSError as error:
        complaint = str(error)
    if complaint is not None:
        rank_zero_warn(f"SLURM did not requeue job {job} ({complaint}): submit it again")
    else:
        rank_zero_info(f"SLURM has requeued job {job}")
