"""Validation that a checkpoint was written before: the run that continues from it catches up on it.

A checkpoint at the end of a step is older than the validation that follows the step. Lightning counts that validation
as done when it resumes: a run that was killed in an hour of measuring would never get those points of its curve.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import RestartStage


def repeat_validation(trainer: Trainer, was_broken_off: bool = False) -> None:
    """Have the step's validation run, whole, before training goes on, where one is due. For ``on_train_start``.

    Of checkpoints from the end of a step it is not known whether their run came to validate afterwards: if it did, the
    same numbers are logged once more.

    Args:
        trainer: resumed or not.
        was_broken_off: the checkpoint was written inside the validation, by which time Lightning counts the step as
            ended.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    if not (loop.restarted_on_train_batch_end or (loop.restarted_on_last and was_broken_off)):
        return
    if fetcher is None or not loop._should_check_val_fx(fetcher):
        return
    # Lightning knows of validations that a checkpoint interrupts, and runs the rest of them: here that is all.
    loop.val_loop.batch_progress.reset()
    loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
    if loop.restarted_on_train_batch_end and not loop._should_accumulate():
        loop._batches_that_stepped -= 1  # it will be counted both by the restart and after the validation
