"""Sampling: which patch size at which step, guidance, and one loop around diffusers' solvers.

Nothing here imports a model; anything callable as ``model(x, t, y, patch_size=...)`` can be sampled from.
"""

from flexidit.sampling.schedule import PatchSchedule, ScheduleStep

__all__ = ["PatchSchedule", "ScheduleStep"]
