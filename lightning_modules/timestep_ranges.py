"""Which step indices each weak patch size is for, where a model is trained for one fixed schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexidit.patch_size import PatchSize
from flexidit.sampling.schedule import PatchSchedule


def parse_ranges(
    given: Mapping[str, Sequence[int]] | str | None, weak: Sequence[PatchSize], num_timesteps: int
) -> dict[PatchSize, range]:
    """Step indices by weak patch size; sizes without an entry have all of them.

    Args:
        given: (first, end) by patch size, or a schedule.
        weak: the sizes that train.
        num_timesteps: 0 is data, this is noise (of a flow, before its shift).

    Raises:
        ValueError: sizes that do not train, an empty range or one outside the diffusion; a schedule that lacks a weak
            size, or is none.

    Example:
        >>> four = PatchSize.parse(4)
        >>> parse_ranges({"4": (400, 1000)}, [four], 1000) == parse_ranges("4:60,2:40", [four], 1000)
        True
    """
    if given is None:
        return {}
    if isinstance(given, str):
        return ranges_of(PatchSchedule.parse(given), weak, num_timesteps)
    ranges = {PatchSize.parse(size): _range(size, bounds, num_timesteps) for size, bounds in given.items()}
    if not given or ranges.keys() - set(weak):
        raise ValueError(
            f"timestep_ranges name {', '.join(map(str, given)) or 'no patch size'}; name weak patch sizes that train: "
            f"{', '.join(size.name for size in weak)}"
        )
    return ranges


def ranges_of(schedule: PatchSchedule, weak: Sequence[PatchSize], num_timesteps: int) -> dict[PatchSize, range]:
    """The part of the diffusion that each weak size's steps cover, from its first step to its last, in either branch.

    Step i of K covers the diffusion from 1 - (i + 1) / K to 1 - i / K, both included: solvers differ in where in
    there they put the timestep.

    That holds of flows too. The step covers evenly spread levels s from 1 - (i + 1) / K to 1 - i / K, the solver shifts
    them, and training shifts its own, (t + 1) / T at index t, in the same way: both shifts are one increasing function
    of s, so that which indices a step covers does not depend on it. (Sampling with another ``time_shift`` than the
    model's moves the steps away from their ranges; give numbers then.)

    Raises:
        ValueError: a size that the schedule does not use.
    """
    unused = [size.name for size in weak if size not in schedule.sizes]
    if unused:
        raise ValueError(f"the schedule {schedule} does not use {', '.join(unused)}: train what it uses and no more")
    count = len(schedule)
    ranges = {}
    for size in weak:
        steps = [index for index, step in enumerate(schedule) if size in (step.cond, step.guide)]
        first = (count - 1 - steps[-1]) * num_timesteps // count
        last = -(-(count - steps[0]) * num_timesteps // count)  # rounded up
        ranges[size] = range(first, min(last + 1, num_timesteps))
    return ranges


def _range(size: str, bounds: Sequence[int], num_timesteps: int) -> range:
    first, end = bounds
    if not 0 <= first < end <= num_timesteps:
        raise ValueError(
            f"timestep_ranges give patch size {size} the steps from {first} and below {end}; give two numbers of "
            f"0 to {num_timesteps}, the smaller one first"
        )
    return range(first, end)
