"""A new run from the weights of an earlier one: its student as it is, or with more weak patch sizes.

This is no resume. Only weights go on, averaged ones where there are some; step, optimizer, schedule, average and order
of the data start anew, and data, losses and settings may be any.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flexidit.checkpoint import build_from, complete, near, read_any
from flexidit.config import FlexConfig, TransformerConfig
from flexidit.export import Adapters
from flexidit.extension import extend
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize
from lightning_modules.settings import FlexSettings, TargetSettings, check_config

_ANEW = "or leave init_from out and start from target.checkpoint"


class EarlierStudent(TargetSettings):
    """The student in a checkpoint of ours (training ``.ckpt``, flexidit ``.safetensors``, exported adapters).

    ``target.checkpoint`` is read where the file holds adapters only: it is the base that they are put on, instead of
    the one that the file names; both must be the same weights. ``target.variant`` and ``overrides`` are compared, and
    ``overrides.class_dropout_prob`` is taken over.

    Args:
        path: the checkpoint.
        target: of the new run.
        flex: of the new run: what the student is to have. Null: a plain model.
    """

    def __init__(self, path: str, target: TargetSettings, flex: FlexSettings | None) -> None:
        super().__init__(target.variant, target.overrides)
        self.path, self.base, self.flex = path, target.checkpoint, flex

    def build(self) -> FlexiTransformer:
        """The student, with the sizes that the new run adds; afterwards ``checkpoint`` says where its base is.

        Raises:
            ValueError: a student that cannot become what the settings ask for, in one sentence.
            FileNotFoundError: no checkpoint, or no base for its adapters.
        """
        found = read_any(self.path)
        self._check_kind(found.config.flex)
        if isinstance(found, Adapters):
            self.checkpoint = self.base or near(found.base.source, Path(self.path))
        else:
            self.checkpoint = self.path
        weights = complete(found, self.base if isinstance(found, Adapters) else None, Path(self.path))
        self._check_target(weights.config)
        student: FlexiTransformer = build_from(weights, Path(self.path)).float()
        student.reset_derived()
        student = self._with_dropout(student if self.flex is None else extend(student, self.flex.patch_sizes))
        return student.train()

    def source_of_base(self, target: FlexiTransformer) -> str | None:
        return self.checkpoint

    def _check_kind(self, found: FlexConfig | None) -> None:
        wanted = self.flex
        if found is None and wanted is None:
            return
        if found is None:
            raise ValueError(f"model.init_from {self.path} holds a plain model: give it as target.checkpoint instead")
        if wanted is None:
            raise ValueError(
                f"model.init_from {self.path} holds a flexible model and flex is null: set flex to what it has, or "
                "take one patch size of it with `flexidit convert --patch-size` as target.checkpoint"
            )
        if found.recipe != wanted.recipe:
            raise ValueError(_no_meaning(self.path, found.recipe, wanted.recipe))
        _check_kept(self.path, found, wanted)

    def _check_target(self, found: TransformerConfig) -> None:
        if self.variant is not None:
            from flexidit.variants import variant_config

            check_config(found, variant_config(self.variant, **self.overrides), self.path)

    def _with_dropout(self, student: FlexiTransformer) -> FlexiTransformer:
        if "class_dropout_prob" in self.overrides:
            probability = self.overrides["class_dropout_prob"]
            student.config = replace(student.config, class_dropout_prob=probability)
        return student


def start_settings(init_from: str | None, target: TargetSettings, flex: FlexSettings | None) -> TargetSettings:
    """Where a run starts: its target, or an earlier student."""
    return target if init_from is None else EarlierStudent(init_from, target, flex)


def _no_meaning(path: str, found: str, wanted: str) -> str:
    """Why weights of one recipe do not start the other."""
    if found == "lora":
        return (
            f"model.init_from {path} holds adapters of a frozen base, which recipe {wanted!r} has no place for: set "
            "flex.recipe to lora, or start from that base as target.checkpoint"
        )
    return (
        f"model.init_from {path} holds weights that all its sizes share, and recipe {wanted!r} puts adapters on a "
        "frozen plain model: set flex.recipe to shared, or take one patch size of it with `flexidit convert "
        "--patch-size` as target.checkpoint"
    )


def _check_kept(path: str, found: FlexConfig, wanted: FlexSettings) -> None:
    """Refuse settings that would change what the student's own sizes are."""
    sizes = {PatchSize.parse(size) for size in wanted.patch_sizes}
    lost = ", ".join(size.name for size in found.weak_patch_sizes if size not in sizes)
    if lost:
        raise ValueError(
            f"model.init_from {path} has the weak patch sizes {lost} too, which flex.patch_sizes lack: name them "
            f"(patch_size_weights 0 leaves one untrained), {_ANEW}"
        )
    for name, value in _kept(wanted).items():
        if getattr(found, name) != value:
            raise ValueError(
                f"model.init_from {path} has {name} {_name(getattr(found, name))}, and flex asks for {_name(value)}, "
                f"with which its weights would compute something else: make both agree, {_ANEW}"
            )


def _kept(wanted: FlexSettings) -> dict[str, Any]:
    if wanted.recipe == "lora":
        alpha = float(wanted.alpha or wanted.rank)
        return {"positions": wanted.positions, "rank": wanted.rank, "alpha": alpha}
    kept: dict[str, Any] = {"positions": wanted.positions, "size_norms": wanted.size_norms}
    if wanted.underlying_patch_size is not None:
        kept["underlying_patch_size"] = PatchSize.parse(wanted.underlying_patch_size)
    return kept


def _name(value: Any) -> Any:
    return value.name if isinstance(value, PatchSize) else value
