"""``flexidit fit|validate|test|predict``: Lightning's command line over any module, data and callbacks in a config."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from flexidit.commands.endings import blaming_the_first, with_endings
from flexidit.commands.resuming import ALLOW_CHANGES, add_resume_options, allow_changes, check_start, spelt
from flexidit.worker_faults import explain_worker
from lightning_modules.checkpoint_choice import check_file, run_checkpoints
from lightning_modules.checkpoint_io import StreamingCheckpointIO
from lightning_modules.safe_checkpoints import SafeCheckpoints

_CONFIG = "configs/imagenet/class_conditional_xl2.yaml"
_EXAMPLES = {
    "fit": f"flexidit fit -c {_CONFIG} -c configs/trainer/ddp.yaml --ckpt_path last",
    "validate": f"flexidit validate -c {_CONFIG} --ckpt_path last",
    "test": f"flexidit test -c {_CONFIG} --ckpt_path last",
    "predict": f"flexidit predict -c {_CONFIG} --ckpt_path last",
}

_KEYWORDS = ("last", "best", "hpc")
"""Checkpoints that Lightning finds by itself."""

# Of no use to who reads them: this command hands its own arguments on; torchdata and Lightning call old functions.
_WARNINGS = (
    ".*LightningCLI's args parameter.*",
    ".*set_vital.*",
    ".*isinstance.treespec.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",  # as it should where a run continues
    ".*FSDP2-wrapped module .* returned a view.*",  # nothing here writes into a prediction
)
_ADVERTISEMENT = "Tip: For seamless"

# Lines of jsonargparse's nested messages that name no cause.
_BOILERPLATE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:$|Expected a path|Expected a <class 'NoneType'>|Given value"
)


_ALIKE = (
    "trainer.callbacks has two of a kind that a checkpoint could not tell apart: leave one out, or, if it is "
    "ModelCheckpoint, give each another every_n_train_steps"
)


class _OptionError(ValueError):
    """A config or an option that the parser refuses; several lines, one in another."""


class _Parser(LightningArgumentParser):
    """Says what is wrong in one sentence instead of printing all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _OptionError(message) from ex


class CLI(LightningCLI):
    """Lightning's command line, which fails early and saves without a second copy in memory."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_resume_options(parser)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(StreamingCheckpointIO())
        callbacks = with_endings(self._get(self.config_init, "trainer.callbacks"))
        trainer = super().instantiate_trainer(**{**kwargs, "plugins": plugins, "callbacks": callbacks})
        self.checkpoints = SafeCheckpoints()
        trainer.callbacks.insert(1, self.checkpoints)  # type: ignore[attr-defined]  # after the one that notes errors
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Lightning's ``fit``, whose errors name the rank that failed first."""
        with blaming_the_first(self.trainer, "fit"):
            self.trainer.fit(**kwargs)

    def before_instantiate_classes(self) -> None:
        # Lightning would notice only after the model has been built.
        path = self._get(self.config, "ckpt_path")
        if path and path not in _KEYWORDS and not Path(path).exists() and "://" not in path:
            raise FileNotFoundError(f"there is no checkpoint at {path}; 'last' continues the run of this config")
        if self.subcommand == "fit":
            check_start(lambda name: self._get(self.config, name))

    def _parse_ckpt_path(self) -> None:
        # Lightning reads the whole file here, for hyper-parameters, which no module of this project has.
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path and Path(path).exists():
            check_file(Path(path))

    def before_fit(self) -> None:
        """Do not write beside an earlier run's checkpoint."""
        allow_changes(self.model, self.config_init["fit"].get(ALLOW_CHANGES))
        found = next((path for path in run_checkpoints(self.trainer) if path.stem == "last"), None)
        if found is not None and self.config_init["fit"].get("ckpt_path") is None:
            raise ValueError(
                f"{found} is of an earlier run: continue it with --ckpt_path last, or move it, or give other folders "
                "to trainer.default_root_dir, the logger and the checkpoints"
            )
        self._find_last("fit")

    def before_validate(self) -> None:
        self._find_last("validate")

    def before_test(self) -> None:
        self._find_last("test")

    def before_predict(self) -> None:
        self._find_last("predict")

    def _find_last(self, command: str) -> None:
        """``last``: the newest of the run's checkpoints, by whatever name; or before it, if that is not good."""
        options = self.config_init[command]
        if options.get("ckpt_path") == "last":
            found = next(iter(run_checkpoints(self.trainer)), None)
            self.checkpoints.takes_newest, self.checkpoints.found = True, found
            options["ckpt_path"] = "last" if found is None else str(found)


def run(args: Sequence[str]) -> int:
    """Run one of Lightning's subcommands; ``args`` starts with its name.

    Raises:
        ValueError, OSError: in one sentence, on options, configs or checkpoints that cannot be used.
    """
    _silence()
    try:
        CLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=_Parser,
            parser_kwargs={"prog": "flexidit", **{name: {"description": _describe(name)} for name in _EXAMPLES}},
            args=spelt(args),
        )
    except (_OptionError, MisconfigurationException) as error:
        raise ValueError(_sentence(str(error))) from error
    except pickle.UnpicklingError as error:
        raise ValueError("the checkpoint holds objects that only running its code could rebuild: refused") from error
    except KeyError as error:
        if "pytorch-lightning_version" not in str(error):
            raise
        raise ValueError("--ckpt_path takes checkpoints of `flexidit fit`; weights go to target.checkpoint") from error
    except RuntimeError as error:
        if "more than one stateful callback" in str(error):
            raise ValueError(_ALIKE) from error
        if (told := explain_worker(error)) is not None:
            raise told from error
        if "Error(s) in loading state_dict" not in str(error):
            raise
        raise ValueError(f"the checkpoint is of another model: {_first_line(str(error))}") from error
    return 0


def _describe(name: str) -> str:
    return f"{name} from configs, of which later ones override earlier ones; for example: {_EXAMPLES[name]}"


def _silence() -> None:
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: _ADVERTISEMENT not in record.getMessage())


def _sentence(message: str) -> str:
    """What a parser's message says is wrong, in one line."""
    lines = [line.strip(" -") for line in message.splitlines()]
    causes = dict.fromkeys(line for line in lines if line and not _BOILERPLATE.search(line))  # each once
    return " ".join(causes or lines)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[1].strip()
