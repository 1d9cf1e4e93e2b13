"""Sampling: which patch size at which step, guidance, and one loop around diffusers' solvers.

Nothing here imports a model; anything callable as ``model(x, t, y, patch_size=...)`` can be sampled from. Importing
this package does not import torch, so that schedules can be priced without it: take ``Sampler`` from ``.sampler``.
"""

from flexidit.sampling.schedule import PatchSchedule, ScheduleStep

__all__ = ["PatchSchedule", "ScheduleStep"]
