"""From the target of a run to the flexible model that it trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from flexidit.config import FlexConfig
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize
from flexidit.recipes import added_parameters, flexify
from lightning_modules.settings import FlexSettings


def make_student(target: FlexiTransformer, flex: FlexSettings) -> FlexiTransformer:
    """The target made flexible; its weights become the student's, so that no second copy is in memory.

    A target that is flexible already, from a checkpoint of an earlier training, is taken as it is.

    Raises:
        ValueError: such a target has not what the settings ask for.
    """
    if target.config.flex is not None:
        _check_student(target.config.flex, flex)
        return target
    student = flexify(target, **vars(flex), keep_target=False)
    _announce(student, flex)
    return student


@rank_zero_only
def _announce(student: FlexiTransformer, flex: FlexSettings) -> None:
    count, share = added_parameters(student)
    print(f"flexify ({flex.recipe}): {count:,} new parameters, {share:.4%} of the target's")


def _check_student(found: FlexConfig, wanted: FlexSettings) -> None:
    """A flexible checkpoint cannot be flexified again: it must have what the settings ask for."""
    sizes = {PatchSize.parse(size) for size in wanted.patch_sizes}
    if set(found.weak_patch_sizes) != sizes or found.recipe != wanted.recipe:
        raise ValueError(
            f"target.checkpoint is flexible already (recipe {found.recipe!r}, patch sizes "
            f"{_names(found.weak_patch_sizes)}), the config asks for recipe {wanted.recipe!r} and {_names(sizes)}: "
            "make both agree"
        )
    expected: dict[str, Any] = {"positions": wanted.positions}
    if found.recipe == "lora":
        expected |= {"rank": wanted.rank, "alpha": float(wanted.alpha or wanted.rank)}
    for name, value in expected.items():
        if getattr(found, name) != value:
            raise ValueError(
                f"target.checkpoint is flexible already, with {name} {getattr(found, name)}, and the config asks for "
                f"{name} {value}: make both agree"
            )


def _names(sizes: set[PatchSize] | tuple[PatchSize, ...]) -> str:
    return ", ".join(size.name for size in sorted(sizes))
