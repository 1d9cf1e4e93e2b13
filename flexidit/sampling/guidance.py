"""Guidance: how a conditional and a guiding prediction become one (paper, section 3.4; READING.md 11).

With c the conditional and g the guiding prediction, the guided one is ``g + scale * (c - g)``. Which g is meant
follows from the two patch sizes of the step:

* equal: g is the *unconditional* prediction at the same size (classifier-free guidance), scale ``cfg_scale``;
* g larger, hence weaker: g is the *conditional* prediction of that weaker size, scale ``weak_guidance_scale``.

Shape legend: N batch, C latent channels, H W latent height and width. A model with learned variance returns 2C
channels, of which the first C are eps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from flexidit.conditions import Captions, Condition, join
from flexidit.patch_size import PatchSize
from flexidit.sampling.schedule import ScheduleStep

Branch: TypeAlias = Literal["cond", "weak", "cond+uncond"]

SCALE_RATIO = 2.5
"""(1 - cfg_scale) / (1 - weak_guidance_scale), which the paper found best (appendix B.4, "More results on CFG")."""


class Forward(Protocol):
    """One forward pass of the model, told which branches its batch holds."""

    def __call__(self, x: Tensor, t: Tensor, y: Condition, *, patch_size: PatchSize, branch: Branch) -> Tensor: ...


@dataclass(frozen=True)
class BranchConditions:
    """What the branches of one batch are told, at every step of a run."""

    cond: Condition
    """N conditions; a view of ``both`` where there is that."""
    both: Condition | None = None
    """2N: the conditional ones, then those of the unconditional prediction; None: no step makes one."""
    num_prepared: int | None = None
    """How many conditions were prepared; None: they are as they were given."""

    @classmethod
    def of(cls, y: Any, null_y: Any, prepare: Callable[[Any], Any]) -> BranchConditions:
        """Joined and prepared, once for all steps.

        Args:
            y: N conditions.
            null_y: N of the unconditional prediction; None: not needed.
            prepare: the model's; it returns what it leaves as it is.
        """
        joined = y if null_y is None else join([y, null_y])
        prepared = prepare(joined)
        num_prepared = None if prepared is joined else len(joined)
        return cls(prepared[: len(y)], None if null_y is None else prepared, num_prepared)

    def prepared_for(self, index: int, branch: Branch) -> int | None:
        """How many of them were prepared for a call: for the first of a run all, for others none."""
        is_first = index == 0 and branch != "weak"
        return self.num_prepared if is_first or self.num_prepared is None else 0


def check_negative(y: Condition, negative: Condition) -> None:
    """Refuse what ``y`` cannot be guided away from.

    Raises:
        ValueError: another kind of condition, not as many, or captions of another text encoder.
    """
    if isinstance(y, Tensor) != isinstance(negative, Tensor) or len(negative) not in (1, len(y)):
        raise ValueError(
            f"negative conditions are as many as the conditions, or a single one, and of their kind; got {len(y)} "
            f"{_kind(y)} and {len(negative)} negative {_kind(negative)}"
        )
    if isinstance(y, Captions) and isinstance(negative, Captions):
        width, other = y.embeddings.shape[2], negative.embeddings.shape[2]
        if width != other:
            raise ValueError(
                f"captions of width {width} and negative ones of width {other} are not of one text encoder; "
                "encode both with the one that the model was trained with"
            )


def _kind(condition: Condition) -> str:
    return "labels" if isinstance(condition, Tensor) else "captions"


def coupled_weak_scale(cfg_scale: float) -> float:
    """Weak-model guidance scale that goes with a classifier-free guidance scale.

    Example:
        >>> coupled_weak_scale(4.0)
        2.2
        >>> coupled_weak_scale(1.0)
        1.0
    """
    return 1 + (cfg_scale - 1) / SCALE_RATIO


def scale_of(step: ScheduleStep, cfg_scale: float, weak_guidance_scale: float) -> float:
    """Guidance scale of one step; at 1.0 the guiding prediction cancels out and is not computed at all."""
    return cfg_scale if step.cond == step.guide else weak_guidance_scale


def predict_pair(
    forward: Forward, x: Tensor, t: Tensor, told: BranchConditions, step: ScheduleStep
) -> tuple[Tensor, Tensor]:
    """Conditional and guiding prediction, each (N, C or 2C, H, W).

    Equal sizes share one forward pass of 2N sequences, conditional ones first; unequal sizes have unequal
    lengths and take one pass each ("approach 2" of Fig. 12: the fewest FLOPs). ``packing.py`` has other ways.
    """
    if step.cond == step.guide:
        assert told.both is not None
        both = forward(torch.cat([x, x]), torch.cat([t, t]), told.both, patch_size=step.cond, branch="cond+uncond")
        cond, guiding = both.chunk(2)
        return cond, guiding
    cond = forward(x, t, told.cond, patch_size=step.cond, branch="cond")
    guiding = forward(x, t, told.cond, patch_size=step.guide, branch="weak")
    return cond, guiding


def combine(
    cond: Tensor, guiding: Tensor, scale: float, *, in_channels: int, guidance_channels: int | None = None
) -> Tensor:
    """Guided prediction, with the variance channels of the conditional one.

    Args:
        cond: (N, C or 2C, H, W).
        guiding: same shape.
        scale: 1.0 gives the conditional prediction.
        in_channels: C.
        guidance_channels: how many of the C channels are guided, the others staying conditional; ``None``: all.
            Official DiT guides the first three of four, and its published samples were made so.

    Returns:
        New tensor of the same shape.
    """
    guided = in_channels if guidance_channels is None else guidance_channels
    eps = guiding[:, :guided] + scale * (cond[:, :guided] - guiding[:, :guided])
    return torch.cat([eps, cond[:, guided:]], dim=1)
