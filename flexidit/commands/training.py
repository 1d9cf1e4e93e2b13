"""``flexidit fit|validate|test|predict``: Lightning's command line over any module, data and callbacks in a config."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

_DESCRIPTION = """Train, validate, test or predict from configs, later ones overriding earlier ones.

example:
  flexidit fit -c configs/imagenet/class_conditional_xl2.yaml -c configs/trainer/ddp.yaml --trainer.max_steps 1000
  flexidit fit -c configs/imagenet/class_conditional_xl2.yaml --ckpt_path last      # continue where it was
"""


def run(args: Sequence[str]) -> int:
    """Run one of Lightning's subcommands; ``args`` starts with its name."""
    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "flexidit", "description": _DESCRIPTION},
        args=list(args),
    )
    return 0
