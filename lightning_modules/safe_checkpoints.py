"""A run that loses no checkpoint: to a disk that is full, to a killed process, to bytes that changed.

Lightning's own callback decides when to save, what to keep and what to remove. This one stands between it and the
disk, on all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_modules.checkpoint_choice import choose, run_folders
from lightning_modules.checkpoint_files import recover
from lightning_modules.checkpoint_io import BackgroundCheckpointIO
from lightning_modules.last_links import make_safe
from lightning_modules.one_reader import on_rank_zero
from lightning_modules.sharded_saves import in_background, save_folder, start_folder, wait_for_writer, writes_folders

_WRAPPED = ("save_checkpoint", "remove_checkpoint", "load_checkpoint", "on_train_end")


class SafeCheckpoints(Callback):
    """Saves that may fail, and loads that are looked at first.

    - A save that fails (disk full, folder read-only) is a warning, and training goes on to the next. Nothing older is
      removed until one succeeds, and ``ModelCheckpoint`` forgets the file that it thinks it has. A run that could not
      save once ends in an error.
    - A sharded checkpoint is written to a temporary folder, which gets its name when every process has written its
      part, as :mod:`lightning_modules.checkpoint_files` does it.
    - What a killed job left half is removed at the next start.
    - A checkpoint is read by rank 0 before all ranks load it: every byte, and whether it is of this model. What is not
      good is refused, with the newest good one named, or that is taken.

    Its hooks come before those of ``ModelCheckpoint``, which Lightning puts last.

    Args:
        takes_newest: go on from the newest good checkpoint of the run where the one asked for is not (``--ckpt_path
            last``).
        found: what this process found for that.
    """

    def __init__(self, takes_newest: bool = False, found: Path | None = None) -> None:
        self.takes_newest, self.found = takes_newest, found
        self._num_tried = self._num_failed = 0
        self._last_failed = False
        self._reason = ""
        self._spared: list[str] = []
        self._missing: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if self.takes_newest:
            _check_all_see(strategy, self.found)
        _unwrap(strategy)
        wrapped: dict[str, Callable[..., Any]] = {"load_checkpoint": self._load}
        if stage == "fit":
            self._recover(trainer)
            for callback in _retaining(trainer):
                make_safe(callback)
            wrapped |= {
                "save_checkpoint": self._save,
                "remove_checkpoint": self._remove,
                "on_train_end": self._end,
            }
        for name, wrapper in wrapped.items():
            setattr(strategy, name, partial(wrapper, trainer, getattr(strategy, name)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _unwrap(trainer.strategy)

    @property
    def saves_nothing(self) -> bool:
        """Whether not one of the saves that were tried has succeeded; the same on all ranks."""
        return 0 < self._num_tried <= self._num_failed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A checkpoint that was saved between a failed save and the next step says that there is one more.
        tracked = {path for callback in _retaining(trainer) for path in _tracked(callback)}
        self._missing |= on_rank_zero(trainer.strategy, lambda: {path for path in tracked if not _exists(path)})
        self._forget(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._forget(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to end as if all were well.

        Raises:
            OSError: not one checkpoint could be saved.
        """
        if self.saves_nothing:
            raise OSError(
                f"not one of this run's {self._num_tried} checkpoints could be saved ({self._reason}), and what it "
                "trained is lost: give it a folder that can be written to, with room"
            )

    def _recover(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        if strategy.is_global_zero:
            for folder in dict.fromkeys([*run_folders(trainer), Path(trainer.default_root_dir)]):
                with suppress(OSError):  # as in a read-only folder, where the first save will say so
                    for name in recover(folder):
                        rank_zero_info(f"removed what a job that was killed had written of {folder / name}")
        strategy.barrier()

    def _save(
        self,
        trainer: Trainer,
        write: Callable[..., None],
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        strategy = trainer.strategy
        path, is_folder = on_rank_zero(strategy, lambda: (filepath, _takes_folder(strategy, filepath)))
        if starts_only := is_folder and in_background(strategy):
            self._note_earlier(trainer)
        self._num_tried += 1
        error: OSError | None = None
        try:
            if starts_only:
                start_folder(strategy, checkpoint, Path(path))
            elif is_folder:
                save_folder(strategy, write, checkpoint, Path(path))
            else:
                write(checkpoint, path, storage_options=storage_options)
        except OSError as raised:
            error = raised
        self._note(trainer, path, error)

    def _note_earlier(self, trainer: Trainer) -> None:
        """Wait for what all ranks write in the background; an error of it is noted now, success with the next save."""
        error = wait_for_writer(trainer.strategy)
        if trainer.strategy.broadcast(error is not None):
            self._note(trainer, None, error)

    def _note(self, trainer: Trainer, path: str | Path | None, error: OSError | None) -> None:
        """Keep in mind how a save ended, the same on all ranks."""
        strategy = trainer.strategy
        told = None if error is None else (error.filename or str(path), error.strerror or str(error))
        told = strategy.broadcast(told)
        self._last_failed = told is not None
        if told is None:
            while self._spared:
                with suppress(OSError):
                    type(strategy).remove_checkpoint(strategy, self._spared.pop())
            return
        failed, self._reason = told
        self._num_failed += 1
        if not on_rank_zero(strategy, lambda: _exists(failed)):
            self._missing.add(failed)
        rank_zero_warn(
            f"{failed} could not be saved ({self._reason}): training goes on to the next save, and no older checkpoint "
            "is removed until one succeeds"
        )

    def _remove(self, trainer: Trainer, remove: Callable[..., None], filepath: str | Path) -> None:
        if self._last_failed:
            self._spared.append(str(filepath))
        else:
            with suppress(OSError):  # a checkpoint too many
                remove(filepath)

    def _load(
        self, trainer: Trainer, read: Callable[..., Any], checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> Any:
        if _is_local(checkpoint_path):
            asked = Path(checkpoint_path)
            chosen = on_rank_zero(trainer.strategy, lambda: choose(asked, trainer, self.takes_newest))
            if chosen != asked:
                trainer.ckpt_path = checkpoint_path = str(chosen)
        return read(checkpoint_path, weights_only=True)

    def _end(self, trainer: Trainer, end: Callable[[], None]) -> None:
        """Wait for what is still being written."""
        if isinstance(trainer.strategy.checkpoint_io, BackgroundCheckpointIO):
            self._note(trainer, None, wait_for_writer(trainer.strategy))
        end()

    def _forget(self, trainer: Trainer) -> None:
        if self._missing:
            for callback in _retaining(trainer):
                forget(callback, self._missing)
            self._missing = set()


def forget(callback: ModelCheckpoint, missing: set[str]) -> None:
    """Have Lightning's callback know only of checkpoints that are there."""
    for path in missing & callback.best_k_models.keys():
        del callback.best_k_models[path]
    if callback.best_model_path in missing:
        pick = min if callback.mode == "min" else max
        scores: dict[str, Any] = callback.best_k_models
        callback.best_model_path = pick(scores, key=lambda path: scores[path], default="")
        callback.best_model_score = scores.get(callback.best_model_path)
    if callback.last_model_path in missing:
        callback.last_model_path = ""


def _check_all_see(strategy: Strategy, found: Path | None) -> None:
    """Some ranks going on and others beginning would wait for one another for ever.

    Raises:
        OSError: some see a checkpoint and others do not.
    """
    some, each = (strategy.reduce_boolean_decision(found is not None, all=every) for every in (False, True))
    if some != each:
        raise OSError(
            "some processes of this job see a checkpoint to go on from and others see none: put "
            "trainer.default_root_dir and the checkpoints on a file system that all nodes share"
        )


def _unwrap(strategy: Strategy) -> None:
    for name in _WRAPPED:
        vars(strategy).pop(name, None)


def _retaining(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _tracked(callback: ModelCheckpoint) -> set[str]:
    paths = {*callback.best_k_models, callback.best_model_path, callback.last_model_path}
    return {path for path in paths if path and _is_local(path)}


def _takes_folder(strategy: Strategy, path: str | Path) -> bool:
    """Whether a folder is written, or must go."""
    return _is_local(path) and (writes_folders(strategy) or Path(path).is_dir())


def _is_local(path: str | Path) -> bool:
    return "://" not in str(path)


def _exists(path: str) -> bool:
    return not _is_local(path) or Path(path).exists()
