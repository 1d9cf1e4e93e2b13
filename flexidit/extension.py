"""More weak patch sizes for a student that has some already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from flexidit.checkpoint import Weights, build_from
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSizeLike
from flexidit.recipes import add_adapted_sizes, add_shared_sizes, check_weaker

Model = TypeVar("Model", bound=FlexiTransformer)


def extend(student: Model, patch_sizes: Sequence[PatchSizeLike]) -> Model:
    """The student with these weak sizes beside its own; its tensors become those of the result.

    All old tensors stay as they are, so that the old sizes compute what they computed, bit for bit. A new size starts
    as ``flexify`` starts it: in recipe "lora" with an adapter that adds nothing and both ends resized from the base's;
    in recipe "shared" with norms and a vector that do nothing, and both ends projected from the shared weights, which
    stay at their underlying size. A size that is larger than that has no more freedom in its ends than the underlying
    size has; where that matters, flexify the target with all sizes, or with a larger ``underlying_patch_size``, anew.

    Raises:
        ValueError: a plain model, or a size that is not weaker than its base.
    """
    flex = student.config.flex
    if flex is None:
        raise ValueError("this model has one patch size: flexify it with all the weak sizes at once")
    new = tuple(size for size in check_weaker(student, patch_sizes) if size not in flex.weak_patch_sizes)
    if not new:
        return student
    if flex.recipe == "lora":
        add_adapted_sizes(student, new, flex)
    else:
        add_shared_sizes(student, new, flex.size_norms)
    sizes = tuple(sorted((*flex.weak_patch_sizes, *new)))
    config = replace(student.config, flex=replace(flex, weak_patch_sizes=sizes))
    # Built again, for the order that parameters have in any student of these sizes: optimizers count them, and ranks
    # that shard a model build it without weights.
    weights = Weights(config, student.state_dict())  # type: ignore[arg-type]
    return cast(Model, build_from(weights, Path("the extended student")).train(student.training))
