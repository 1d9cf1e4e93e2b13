"""Files and panels of images and of clips, with the same frames in both."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from callbacks.sample_pictures import SampleRow, add_gif, write_samples


def rows(*shape: int) -> list[SampleRow]:
    samples = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return [SampleRow(samples[0], "budget 1", "100.0% of the FLOPs"), SampleRow(samples[1], "budget 0.6", "60.0%")]


def written(root: Path, *shape: int) -> EventAccumulator:
    with SummaryWriter(str(root / "board")) as board:
        write_samples(rows(*shape), ["a", "b", "c"], "title", 7, root / "samples", [board], fps=5)
    return EventAccumulator(str(root / "board")).Reload()


def test_images_are_one_grid(tmp_path: Path) -> None:
    events = written(tmp_path, 1, 8, 8)
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["step_00000007.png"]
    assert events.Tags()["images"] == ["samples"]


def test_clips_are_a_sheet_and_an_animation(tmp_path: Path) -> None:
    events = written(tmp_path, 1, 4, 8, 8)
    gif = (tmp_path / "samples" / "step_00000007.gif").read_bytes()
    (panel,) = events.Images("clips")
    assert panel.encoded_image_string == gif and panel.step == 7
    animation = Image.open(BytesIO(gif))
    assert animation.n_frames == 4 and animation.size == (panel.width, panel.height)
    assert {frame.info["duration"] for frame in ImageSequence.Iterator(animation)} == {200}
    (sheet,) = events.Images("samples")
    with Image.open(tmp_path / "samples" / "step_00000007.png") as picture:
        assert picture.size == (sheet.width, sheet.height)
        assert picture.height > 6 * 64  # three clips at two budgets


def test_the_animation_is_one_that_tensorboard_knows(tmp_path: Path) -> None:
    from tensorboard.util.img_mime_type_detector import from_bytes

    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 100, 200)]
    buffer = BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    with SummaryWriter(str(tmp_path)) as board:
        add_gif(board, "clips", buffer.getvalue(), (8, 8), 3)
    (panel,) = EventAccumulator(str(tmp_path)).Reload().Images("clips")
    assert from_bytes(panel.encoded_image_string) == "image/gif" and panel.step == 3
