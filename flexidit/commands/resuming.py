"""What a run of ``flexidit fit`` starts from: resumes with other settings, new runs from old weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules.base import DiffusionModule

ALLOW_CHANGES = "resume.allow_changes"
_OWN_RUN = ("last", "hpc")
"""Checkpoints of the run itself, which may not have begun."""


def add_resume_options(parser: LightningArgumentParser) -> None:
    """``--resume.allow_changes``."""
    parser.add_argument(
        f"--{ALLOW_CHANGES}",
        action="store_true",
        help="go on from --ckpt_path although data, losses, optimizer or other settings of the run have changed",
    )


def spelt(args: Sequence[str]) -> list[str]:
    """The command line with ``--resume.allow-changes`` spelt as the config spells it."""
    hyphenated = f"--{ALLOW_CHANGES.replace('_', '-')}"
    return [f"--{ALLOW_CHANGES}" + arg[len(hyphenated) :] if arg.startswith(hyphenated) else arg for arg in args]


def check_start(get: Callable[[str], Any]) -> None:
    """Refuse two sources of weights for one run.

    ``last`` is none: it continues the run that ``init_from`` started, once that has a checkpoint, so that one command
    line serves a job that is requeued.

    Args:
        get: value of an option of the command.

    Raises:
        ValueError: naming both.
    """
    path, init_from = get("ckpt_path"), get("model.init_args.init_from")
    if path and init_from and path not in _OWN_RUN:
        raise ValueError(
            f"--ckpt_path {path} continues a run and model.init_from {init_from} starts a new one from its weights: "
            "give one of both (--ckpt_path last goes with init_from, and continues the new run)"
        )


def allow_changes(model: LightningModule, is_allowed: bool) -> None:
    """Tell a training module of ours what the command line allows."""
    if isinstance(model, DiffusionModule):
        model.allows_changes = is_allowed
