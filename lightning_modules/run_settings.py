"""What decides the course of a run, in plain values: each checkpoint holds it, and each resume is compared with it.

A difference is one of three kinds:

- of the *model*: its config or its base. The checkpoint's tensors are those of another one, and cannot be loaded.
  ``model.init_from`` starts a new run from them, where that has a meaning.
- of the *course*: data, seed, global batch, losses, optimizer, precision, clipping, averages; the length of the run
  where the learning rate follows it. A run that goes on with another one is neither the old run nor a new one, so it is
  refused, unless ``--resume.allow_changes`` says that it is meant. What a resume takes over is then this run's.
- *free*: the length of the run otherwise, validation, logging, saving; and how the same is computed: ``compile``,
  ``gradient_checkpointing``, ``gather_dtype``, workers (not of tars), the number of processes as long as the global
  batch (``batch_size`` x processes x ``accumulate_grad_batches``) stays.

What is compared comes from the objects themselves: ``resume_settings`` of the module, of the data and of each callback
that has some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from flexidit.config import config_to_dict
from lightning_modules.progress import convert_progress, know_as_saved
from lightning_modules.trained_state import check_base, check_names, trained_names

if TYPE_CHECKING:
    from lightning_modules.base import DiffusionModule

# Fields of a model's config that decide how it is trained and not which tensors it has or what they compute.
_OF_TRAINING = ("class_dropout_prob", "time_shift")

ANOTHER_MODEL = "make both agree, or start a new run from its weights with model.init_from"


def describe_run(module: DiffusionModule) -> dict[str, Any]:
    """The settings of the course of a run, by names that can be found in its config."""
    trainer = module.trainer
    data = dict(getattr(getattr(trainer, "datamodule", None), "resume_settings", {}))
    split = {
        "batch_size": data.pop("batch_size", None),
        "processes": trainer.world_size,
        "accumulated": trainer.accumulate_grad_batches,
    }
    config = config_to_dict(module.model.config)
    settings = {
        "model": {"class": type(module).__name__, **module.resume_settings, **{n: config[n] for n in _OF_TRAINING}},
        "data": data,
        "trainer": _trainer_settings(module),
        "callbacks": {
            type(callback).__name__: callback.resume_settings
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if hasattr(callback, "resume_settings")
        },
    }
    return {"settings": _plain(settings), "batch": split}


def check_resume(checkpoint: dict[str, Any], module: DiffusionModule) -> None:
    """Refuse a checkpoint of another model, and, to train on, one of another run; in one sentence.

    Also puts Lightning's count of micro-batches right, in place (:mod:`lightning_modules.progress`).

    Raises:
        ValueError: naming each difference as "old -> new".
    """
    _check_model(checkpoint, module)
    if module.trainer.state.fn != TrainerFn.FITTING:
        return
    own = describe_run(module)
    saved = checkpoint.get("flexidit", {}).get("run", own)  # an older checkpoint does not say
    differing = [*differences(saved["settings"], own["settings"]), *_batch_differences(saved["batch"], own["batch"])]
    if differing and not module.allows_changes:
        raise ValueError(
            f"the checkpoint is of a run with other settings ({', '.join(differing)}): make both agree, or accept the "
            "changes with --resume.allow_changes"
        )
    if differing:
        rank_zero_warn(f"the run goes on with changed settings, not as it would have: {', '.join(differing)}")
    accumulated = (each["batch"]["accumulated"] for each in (saved, own))
    convert_progress(checkpoint, getattr(module.trainer, "datamodule", None), *accumulated)
    know_as_saved(module.trainer, checkpoint["global_step"])


def adopt_optimizer(module: DiffusionModule) -> None:
    """Put this run's learning rate, decays and schedule in the place of a checkpoint's, where changes are allowed.

    Loading an optimizer's state brings back its settings too, and a change would have no effect.
    """
    if not module.allows_changes:
        return
    settings = module.optimizer_settings
    for configured in module.trainer.lr_scheduler_configs:
        scheduler: Any = configured.scheduler
        scheduler.base_lrs = [settings.lr for _ in scheduler.base_lrs]
        for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group |= {"initial_lr": settings.lr, "lr": settings.lr * factor(scheduler.last_epoch)}
            group |= {"weight_decay": settings.weight_decay, "betas": tuple(settings.betas)}
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def differences(saved: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs, by dotted name.

    Example:
        >>> differences({"data": {"seed": 0, "size": 8}, "ema": {"decay": 0.9}}, {"data": {"seed": 1, "size": 8}})
        ['data.seed 0 -> 1', 'ema decay 0.9 -> none']
    """
    found: list[str] = []
    for name in [*own, *(name for name in saved if name not in own)]:
        old, new = saved.get(name), own.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} {_shown(old)} -> {_shown(new)}")
    return found


def model_differences(said: Mapping[str, Any], module: DiffusionModule) -> list[str]:
    """What of the model that a checkpoint says it holds is not as the module's, by name of a config's field."""
    if "config" not in said:
        return []
    theirs, ours = (
        {name: value for name, value in config.items() if name not in _OF_TRAINING}
        for config in (said["config"], config_to_dict(module.model.config))
    )
    return differences(theirs, ours)


def _check_model(checkpoint: Mapping[str, Any], module: DiffusionModule) -> None:
    said = checkpoint.get("flexidit", {})
    differing = model_differences(said, module)
    if differing:
        what = f"the checkpoint is of another model than the config's ({', '.join(differing)})"
        raise ValueError(f"{what}: {ANOTHER_MODEL}")
    check_base(said.get("base"), module.base_identity)
    if module.base_identity is not None and "state_dict" in checkpoint:  # ModelParallelStrategy has taken it out
        check_names(checkpoint["state_dict"], trained_names(module))


def _trainer_settings(module: DiffusionModule) -> dict[str, Any]:
    trainer: Any = module.trainer
    settings = {"precision": str(trainer.precision), "gradient_clip_val": trainer.gradient_clip_val or None}
    if trainer.gradient_clip_val:
        algorithm = trainer.gradient_clip_algorithm
        settings["gradient_clip_algorithm"] = (
            "norm" if algorithm is None else str(getattr(algorithm, "value", algorithm))
        )
    if module.optimizer_settings.decay == "cosine":  # the learning rate follows the length
        settings |= {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    return settings


def _batch_differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    if saved["batch_size"] is None or own["batch_size"] is None:
        return []
    old, new = _global_batch(saved), _global_batch(own)
    return [] if old == new else [f"global batch {_spelt(saved)} -> {_spelt(own)}"]


def _global_batch(split: Mapping[str, Any]) -> int:
    return split["batch_size"] * split["processes"] * split["accumulated"]


def _spelt(split: Mapping[str, Any]) -> str:
    return (
        f"{_global_batch(split)} (data.batch_size {split['batch_size']} x {split['processes']} processes x "
        f"accumulate_grad_batches {split['accumulated']})"
    )


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_shown(item)}" for name, item in value.items()) or "nothing"
    return "none" if value is None else str(value)


def _plain(value: Any) -> Any:
    """The same in what ``weights_only=True`` reads."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
