from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from flexidit.patch_size import PatchSize
from flexidit.positions import interpolate_table, patch_centres, sincos_2d

BASE = PatchSize.parse(2)


def test_table_agrees_with_diffusers() -> None:
    theirs = get_2d_sincos_pos_embed(64, 6, base_size=6, output_type="pt")
    _, rows, columns = patch_centres((12, 12), BASE, BASE)
    torch.testing.assert_close(sincos_2d(rows, columns, 64), theirs.double(), atol=1e-6, rtol=1e-6)


def test_rows_and_columns_are_not_exchanged_on_oblong_grids() -> None:
    _, rows, columns = patch_centres((4, 12), BASE, BASE)
    table = sincos_2d(rows, columns, 32).unflatten(0, (2, 6))
    assert torch.equal(table[0, :, 16:], table[0, :1, 16:].expand(6, -1))  # one row: one encoding in the second half
    assert torch.equal(table[:, 3, :16], table[:1, 3, :16].expand(2, -1))  # one column: one in the first half


@pytest.mark.parametrize("weak", [3, 4, 8])
def test_a_weak_patch_sits_at_the_mean_of_the_pixels_it_covers(weak: int) -> None:
    """In units of the pre-trained grid, where pixel k has coordinate (k - (p - 1) / 2) / p."""
    _, rows, _ = patch_centres((24, 24), PatchSize.parse(weak), BASE)
    pixels = (torch.arange(24, dtype=torch.float64) - 0.5) / 2
    torch.testing.assert_close(rows, pixels.unflatten(0, (-1, weak)).mean(1))


def test_grid_positions_are_indices() -> None:
    times, rows, _ = patch_centres((6, 8, 8), PatchSize(2, 4, 4), PatchSize(1, 2, 2), positions="grid")
    assert times.tolist() == [0, 1, 2]
    assert rows.tolist() == [0, 1]


def test_corners_are_centres_without_the_shift_by_half_a_patch() -> None:
    weak = PatchSize.parse(4)
    _, corners, _ = patch_centres((16, 16), weak, BASE, positions="corners")
    _, centres, _ = patch_centres((16, 16), weak, BASE)
    assert corners.tolist() == [0, 2, 4, 6] and (centres - corners).tolist() == [0.5] * 4


def test_a_learned_table_is_exact_at_its_entries_and_linear_between_them() -> None:
    rows, columns = torch.arange(3, dtype=torch.float64), torch.arange(5, dtype=torch.float64)
    table = torch.randn(1, 15, 4)
    assert torch.equal(interpolate_table(table, (3, 5), rows, columns), table)
    plane = (2 * rows[:, None] - columns).flatten()[None, :, None].float()
    between = interpolate_table(plane, (3, 5), torch.tensor([0.5, 1.75]).double(), torch.tensor([3.25]).double())
    torch.testing.assert_close(between.flatten(), torch.tensor([2 * 0.5 - 3.25, 2 * 1.75 - 3.25]))
    outside = interpolate_table(plane, (3, 5), torch.tensor([-1.0, 9.0]).double(), torch.tensor([0.0]).double())
    assert outside.flatten().tolist() == [0, 4]
