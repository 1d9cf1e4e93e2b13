"""Pixels arrive unchanged in the picture, enlarged by whole factors, in line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flexidit.pictures import GridRow, draw_grid, save_grid, to_image


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def find(picture: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """Places of an exact copy of ``tile``."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, tile.shape)[:, :, 0]
    return [tuple(place) for place in np.argwhere((windows == tile).all(axis=(2, 3, 4))).tolist()]


def images(count: int, channels: int = 3, size: int = 4) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_levels_are_rounded_and_clipped() -> None:
    picture = to_image(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(1, 1, 5))
    assert levels(picture)[0].tolist() == [[v] * 3 for v in (0, 0, 128, 255, 255)]


def test_every_pixel_becomes_a_square() -> None:
    x = images(2)
    picture = levels(draw_grid([GridRow(x, "row")], min_side=10))
    for image in x:
        enlarged = levels(to_image(image)).repeat(3, axis=0).repeat(3, axis=1)  # 4 to 12, the first multiple above 10
        assert len(find(picture, enlarged)) == 1


def test_large_images_stay_as_they_are() -> None:
    x = images(1, size=80)
    assert len(find(levels(draw_grid([GridRow(x, "row")])), levels(to_image(x[0])))) == 1


def test_rows_and_columns_are_in_line() -> None:
    x = images(4, channels=1)
    picture = levels(draw_grid([GridRow(x[:2], "a", "note"), GridRow(x[2:], "a longer label")], "title", ["0", "1"]))
    squares = [levels(to_image(image)).repeat(16, axis=0).repeat(16, axis=1) for image in x]
    (a, b, c, d) = (find(picture, square)[0] for square in squares)
    assert a[0] == b[0] and c[0] == d[0] and a[1] == c[1] and b[1] == d[1]
    assert c[0] >= a[0] + 64 and b[1] >= a[1] + 64


def test_labels_leave_ink_outside_the_images() -> None:
    x = images(1)
    bare, labelled = (levels(draw_grid([GridRow(x, label)])) for label in ("", "budget 0.6"))
    assert labelled.shape[1] > bare.shape[1]
    assert (labelled[:, :100] < 200).any()


def test_a_long_title_fits() -> None:
    picture = levels(draw_grid([GridRow(images(1), "x")], title="title " * 40))
    assert (picture[:, -24:] == 255).all()


def test_long_column_titles_take_several_lines() -> None:
    x = images(3)
    short, long = (levels(draw_grid([GridRow(x, "x")], columns=[name] * 3)) for name in ("bold", "a bold narrow zero"))
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0]
    gaps = [find(long, levels(to_image(image)).repeat(16, axis=0).repeat(16, axis=1))[0][1] for image in x]
    for left in gaps[1:]:  # neighbours do not write into one another
        assert (long[:, left - 4 : left - 2] == 255).all()


def test_saved_as_png(tmp_path: Path) -> None:
    path = save_grid([GridRow(images(2), "row")], tmp_path / "new" / "grid.png")
    assert Image.open(path).format == "PNG"


def test_bad_images_are_refused() -> None:
    with pytest.raises(ValueError, match="got none"):
        draw_grid([])
    with pytest.raises(ValueError, match="all of one size"):
        draw_grid([GridRow(images(1), "a"), GridRow(images(1, size=70), "b")])
    with pytest.raises(ValueError, match=r"got \(4, 2, 2\)"):
        to_image(torch.zeros(4, 2, 2))
