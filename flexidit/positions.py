"""Where a patch sits: positional encodings evaluated at patch centres.

The unit is the pre-trained grid: a patch of the base size sits at its integer index, a patch of twice that size at
``2 * i + 0.5`` (paper, section 3.1 and appendix C.2; READING.md, gap 7). ``"corners"`` leaves out the shift by half a
patch, ``2 * i``: a scale is something that stock code knows (``interpolation_scale`` of diffusers), a shift is not.
``"grid"`` places patch ``i`` at index ``i``, as stock code does that knows nothing of other patch sizes.

Shape legend: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexidit.config import Positions
from flexidit.patch_size import PatchSize


def patch_centres(
    size: Sequence[int],
    patch_size: PatchSize,
    base_patch_size: PatchSize,
    *,
    positions: Positions = "coords",
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of the patches along time, height and width, in units of the base patch: three float64 vectors.

    Example:
        >>> _, rows, _ = patch_centres((8, 8), PatchSize(1, 4, 4), PatchSize(1, 2, 2))
        >>> rows.tolist()
        [0.5, 2.5]
    """
    axes = []
    for count, side, base in zip(patch_size.grid(size), patch_size.as_tuple(), base_patch_size.as_tuple(), strict=True):
        index = torch.arange(count, dtype=torch.float64, device=device)
        shift = (side - base) / 2 if positions == "coords" else 0.0
        axes.append(index if positions == "grid" else (index * side + shift) / base)
    return axes[0], axes[1], axes[2]


def sincos_1d(coords: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of the coordinates at ``dim / 2`` frequencies from 1 to 1 / 10000: (M,) -> (M, dim)."""
    exponent = torch.arange(dim // 2, dtype=coords.dtype, device=coords.device) / (dim / 2)
    angles = torch.outer(coords, 10000.0**-exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """DiT's table, row-major, features of the column before those of the row: (h,), (w,) -> (h * w, D)."""
    across = sincos_1d(columns, dim // 2).expand(len(rows), -1, -1)  # (h, w, D / 2)
    down = sincos_1d(rows, dim // 2).unsqueeze(1).expand(-1, len(columns), -1)  # (h, w, D / 2)
    return torch.cat([across, down], dim=2).flatten(0, 1)


def rotary_angles(frames: Tensor, rows: Tensor, columns: Tensor, head_size: int) -> Tensor:
    """By which pairs of channels are rotated: (f,), (h,), (w,) -> (f * h * w, head_size / 2), in the type given.

    Wan's split: two thirds of ``head_size // 2`` pairs to rows and columns, equally and rounded down, the others to
    time; along each axis frequencies from 1 down to nearly 1 / 10000 (Su et al. 2021).
    """
    in_space = 2 * (head_size // 6)
    sizes = (head_size - 2 * in_space, in_space, in_space)
    shape = (len(frames), len(rows), len(columns), -1)
    axes = []
    for axis, (coords, size) in enumerate(zip((frames, rows, columns), sizes, strict=True)):
        exponent = torch.arange(0, size, 2, dtype=coords.dtype, device=coords.device) / size
        angles = torch.outer(coords, 10000.0**-exponent)
        axes.append(angles.view(*[-1 if i == axis else 1 for i in range(3)], size // 2).expand(shape))
    return torch.cat(axes, dim=3).flatten(0, 2)


def interpolate_table(table: Tensor, grid: Sequence[int], rows: Tensor, columns: Tensor) -> Tensor:
    """A learned table (1, h * w, D) of a grid (h, w), read between its entries: (h',), (w',) -> (1, h' * w', D).

    Bilinear, exact at whole coordinates; what lies outside takes the border.
    """
    down, across = (_linear_weights(c, size, table) for c, size in zip((rows, columns), grid, strict=True))
    with torch.autocast(table.device.type, enabled=False):  # as precise as the base size, which adds the table itself
        lines = torch.einsum("ih,hwd->iwd", down, table[0].unflatten(0, tuple(grid)))
        return torch.einsum("jw,iwd->ijd", across, lines).flatten(0, 1).unsqueeze(0)


def interpolate_line(table: Tensor, coords: Tensor) -> Tensor:
    """A learned table along one axis, read between its entries: (1, n, D), (m,) -> (1, m, D); see above."""
    with torch.autocast(table.device.type, enabled=False):
        return torch.einsum("in,ond->oid", _linear_weights(coords, table.shape[1], table), table)


def _linear_weights(coords: Tensor, size: int, like: Tensor) -> Tensor:
    """Hat functions: (M,) -> (M, size), rows that sum to one."""
    index = torch.arange(size, dtype=coords.dtype, device=coords.device)
    return (1 - (coords.clamp(0, size - 1).unsqueeze(1) - index).abs()).clamp(min=0).to(like)
