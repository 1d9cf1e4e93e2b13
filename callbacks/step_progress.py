"""One progress bar for a whole run counted in optimizer steps: Lightning's own bars start again with every epoch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class StepProgress(ProgressBar):
    """Shows steps done, the time left and the latest loss.

    The loss is read from the device only every ``refresh_every_n_steps``: reading it each step would wait for the
    device each step.

    Args:
        description: What is being trained.
        refresh_every_n_steps: Steps between two refreshes.
    """

    def __init__(self, description: str = "training", refresh_every_n_steps: int = 20) -> None:
        super().__init__()
        self.description, self.refresh_every_n_steps = description, refresh_every_n_steps
        self._enabled = True
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled or not trainer.is_global_zero:
            return
        total = int(trainer.estimated_stepping_batches) if trainer.estimated_stepping_batches > 0 else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress.start()
        self._task = self._progress.add_task(self.description, total=total, completed=trainer.global_step, loss="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None or self._task is None or trainer.global_step % self.refresh_every_n_steps:
            return
        loss = trainer.callback_metrics.get("train/loss")
        text = "" if loss is None else f"loss {float(loss):.4f}"
        self._progress.update(self._task, completed=trainer.global_step, loss=text)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=trainer.global_step)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None
