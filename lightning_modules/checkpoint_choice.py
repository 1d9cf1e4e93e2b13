"""Which checkpoint a run continues from: the one asked for if it is whole and of this model, or the newest that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from flexidit.identity import unwrapped
from flexidit.sharded_files import check_sharded, describe_sharded, is_sharded
from flexidit.weight_files import load_pickle
from lightning_modules.base import DiffusionModule
from lightning_modules.checkpoint_files import SUFFIX, candidates
from lightning_modules.run_settings import ANOTHER_MODEL, model_differences

_BY_SIGNAL = "hpc_ckpt_*" + SUFFIX


def run_folders(trainer: Trainer) -> list[Path]:
    """Where a run's callbacks write its checkpoints."""
    folders: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            found = [Path(path).parent for path in callback._find_last_checkpoints(trainer)]
            folders += [Path(callback.dirpath)] if callback.dirpath else found[:1]
    return list(dict.fromkeys(folders))


def run_checkpoints(trainer: Trainer) -> list[Path]:
    """A run's checkpoints, newest first: those of its callbacks, and of SLURM's signal."""
    root = Path(trainer.default_root_dir)
    folders = run_folders(trainer)
    return [path for path in candidates([*folders, root]) if path.parent in folders or path.match(_BY_SIGNAL)]


def check_file(path: Path) -> None:
    """Refuse quickly what cannot be a checkpoint of a run, without looking at every byte.

    Raises:
        ValueError: in one sentence, which names it and the newest good one beside it.
    """
    try:
        _described(path, check_bytes=False)
    except ValueError as error:
        raise ValueError(f"{error}; {_offer(_siblings(path), path)}") from None


def check_checkpoint(path: Path, module: LightningModule, resumes: bool) -> None:
    """Look at every byte, and whether the model is this one.

    Args:
        path: a file or a folder.
        module: what it is for; of modules that are not of this project nothing is known.
        resumes: whether training goes on, which takes more than weights.

    Raises:
        ValueError: it is not good; the sentence names it.
    """
    saved = _described(path)
    if resumes and "optimizer_states" not in saved:
        raise ValueError(f"{path} holds weights only, which training cannot go on from: they go to target.checkpoint")
    if isinstance(module, DiffusionModule) and "flexidit" in saved:
        is_adapters = saved["flexidit"].get("base") is not None
        if is_adapters == (module.base_identity is not None):  # if not, the module has its own words for it
            _check_same_config(path, saved["flexidit"], module)
            _check_same_tensors(path, saved["state_dict"], module)


def choose(path: Path, trainer: Trainer, takes_newest: bool) -> Path:
    """The checkpoint to read: the one asked for, or where that is allowed the newest good one before it.

    Raises:
        ValueError: it is not good, in one sentence that names it and the newest that is.
    """
    module, resumes = trainer.lightning_module, trainer.state.fn == "fit"
    others = run_checkpoints(trainer) if takes_newest else _siblings(path)
    problems: list[str] = []
    for candidate in [path, *(other for other in others if other != path)]:
        try:
            check_checkpoint(candidate, module, resumes)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if candidate != path and not takes_newest:
            raise ValueError(f"{problems[0]}; {_offered(candidate, path)}")
        if problems:
            rank_zero_warn(f"{'; '.join(problems)}; going on from {candidate}, the newest good one")
        return candidate
    raise ValueError(f"{problems[0]}; {_offered(None, path)}")


def _described(path: Path, check_bytes: bool = True) -> Mapping[str, Any]:
    """What a checkpoint holds; without reading its tensors, but for checking them."""
    if is_sharded(path):
        if check_bytes:
            check_sharded(path)
        saved: Mapping[str, Any] = describe_sharded(path)
    elif path.is_dir():
        raise ValueError(f"{path} is a folder without a checkpoint in it")
    else:
        saved = load_pickle(path, check_bytes)
    if "pytorch-lightning_version" not in saved:
        raise ValueError(
            f"{path} is no checkpoint of `flexidit fit`, which --ckpt_path takes: weights go to target.checkpoint"
        )
    return saved


def _check_same_config(path: Path, said: Mapping[str, Any], module: DiffusionModule) -> None:
    differing = model_differences(said, module)
    if differing:
        raise ValueError(f"{path} is of another model than the config's ({', '.join(differing)}): {ANOTHER_MODEL}")


def _check_same_tensors(path: Path, saved: Mapping[str, Tensor], module: LightningModule) -> None:
    theirs = {unwrapped(name): tuple(tensor.shape) for name, tensor in saved.items()}
    ours = {unwrapped(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    differing = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if differing:
        name = differing[0]
        what = f"{name} is {_shape(theirs.get(name))} there and {_shape(ours.get(name))} here"
        raise ValueError(f"{path} is of another model: {len(differing)} tensors differ, {what}")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "one number"


def _siblings(path: Path) -> list[Path]:
    return candidates([path.parent])


def _offer(paths: Iterable[Path], asked: Path) -> str:
    """Where the model is not known yet."""
    for path in paths:
        if path != asked:
            try:
                _described(path)
            except (ValueError, OSError):
                continue
            return _offered(path, asked)
    return _offered(None, asked)


def _offered(good: Path | None, asked: Path) -> str:
    if good is None:
        return f"there is no good one in {asked.parent}"
    return f"the newest good one before it is {good}: give that to --ckpt_path"
