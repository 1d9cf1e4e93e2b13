"""``save_last: link`` of Lightning's callback, where a link that cannot be made costs a warning.

Lightning removes the old link before it makes the new one, whether or not the new checkpoint could be saved, and where
the new one cannot be made (a full disk, a folder that is read-only) rank 0 fails alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.checkpoint_files import delete
from lightning_modules.one_reader import on_rank_zero

_TEMPORARY = ".flexidit-link"
"""Beside the link, and not where checkpoints are written: a thread may be at work there."""


def make_safe(callback: ModelCheckpoint) -> None:
    """Have it link as this module does."""
    callback._link_checkpoint = link  # type: ignore[method-assign]


def link(trainer: Trainer, filepath: str, linkpath: str) -> None:
    """Have ``linkpath`` point to a checkpoint, in one step; the old link stays where that fails. All ranks call it."""
    is_in_background = hasattr(trainer.strategy.checkpoint_io, "wait")  # it will be there
    try:
        on_rank_zero(trainer.strategy, lambda: _link(Path(filepath), Path(linkpath), is_in_background))
    except OSError as error:
        rank_zero_warn(
            f"{linkpath} could not be made to point to {filepath} ({error}): --ckpt_path last finds the newest "
            "checkpoint of the run without it"
        )


def _link(target: Path, path: Path, is_in_background: bool) -> None:
    if target == path or not (target.exists() or is_in_background):
        return  # that it could not be saved has been said
    temporary = path.with_name(_TEMPORARY)
    delete(temporary)  # of a job that was killed
    temporary.symlink_to(os.path.relpath(target, path.parent))
    if path.is_dir() and not path.is_symlink():
        delete(path)
    temporary.replace(path)
