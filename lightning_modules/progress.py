"""Lightning's counts of micro-batches and epochs, put right where a checkpoint is resumed.

A checkpoint may be of the middle of a step of several micro-batches: Lightning saves by time, and on signals. The
gradients of the begun step are not in it. So a resume repeats that step from its first micro-batch.

And Lightning (2.6) does not count the epoch as begun that follows a resume at an epoch's end. If such a run is resumed
at an epoch's end again, the number of epochs is wrong by one, and with ``max_epochs`` the length of the run.

Nor does it know after a resume which step was saved: in the first micro-batch it would write that step's file again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


def begun_batches(progress: Mapping[str, Any], accumulated: int) -> int:
    """Micro-batches of a step that is not complete.

    Args:
        progress: state of the training loop's ``batch_progress``.
        accumulated: micro-batches of a step.
    """
    return 0 if progress["is_last_batch"] else progress["current"]["ready"] % accumulated


def convert_progress(checkpoint: dict[str, Any], datamodule: Any, old: int, new: int) -> None:
    """Change the loops and the place in the data of a checkpoint, in place, so that training goes on with a whole step.

    Args:
        checkpoint: Lightning's, before anything of this is loaded.
        datamodule: of the run.
        old: micro-batches of a step, where it was saved.
        new: micro-batches of a step now; the size of the global batch is the same.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loops.get("epoch_loop.batch_progress")
    if progress is None:
        return
    _count_begun_epoch(loops["epoch_progress"], progress)
    begun = begun_batches(progress, old)
    if begun:
        _go_back(progress, begun)
        for place in _places(checkpoint, datamodule):
            place["batch"] -= begun
    if old != new:
        rank_zero_info(f"a step of {old} micro-batches goes on as one of {new}")
        for counts in (progress["total"], progress["current"]):
            lacking = counts["ready"] - counts["completed"]  # the last one is not completed while it is saved
            counts.update({name: count // old * new for name, count in counts.items()})
            counts["completed"] = counts["ready"] - lacking


def know_as_saved(trainer: Trainer, step: int) -> None:
    """Have no callback that saves every so many steps save this one again; those that wait for a metric may have to."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps and callback.monitor is None:
            callback._last_global_step_saved = step


def _count_begun_epoch(epochs: dict[str, Any], progress: Mapping[str, Any]) -> None:
    """As in a run that was not interrupted: an epoch in which a micro-batch is under way has begun."""
    is_under_way = progress["current"]["completed"] == progress["current"]["ready"] - 1
    if is_under_way and len(set(epochs["total"].values())) == 1:
        for counts in (epochs["total"], epochs["current"]):
            counts.update({name: counts[name] + 1 for name in ("ready", "started")})


def _places(checkpoint: Mapping[str, Any], datamodule: Any) -> list[dict[str, Any]]:
    """Where the place in the data is written down: by the data module, and by Lightning for its loaders."""
    own = checkpoint.get(type(datamodule).__qualname__, {}).get("train_loader")
    loaders = checkpoint["loops"]["fit_loop"].get("state_dict", {}).get("combined_loader", [])
    places = {id(place): place for place in (own, *loaders) if isinstance(place, dict) and "batch" in place}
    return list(places.values())


def _go_back(progress: dict[str, Any], begun: int) -> None:
    """As if saved at the end of the step before; of an epoch's first step, as if nothing of the epoch had been done."""
    is_first = progress["current"]["ready"] == begun
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"] - begun
        counts.update(dict.fromkeys(counts, ready))
        counts["completed"] = ready if is_first else ready - 1
