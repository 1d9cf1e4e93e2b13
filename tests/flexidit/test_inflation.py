"""Image models as the start of models of clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flexidit import create_model, flexify
from flexidit.checkpoint import save_checkpoint
from flexidit.conditions import Captions
from flexidit.inflation import inflate
from lightning_modules.settings import TargetSettings

Randomise = Callable[..., nn.Module]
T = torch.tensor([10, 800])
TABLES: dict[str, dict[str, Any]] = {"sincos": {}, "learned": {"position_table": "learned"}}


@pytest.fixture
def y() -> Captions:
    return Captions(torch.randn(2, 9, 64), torch.ones(2, 9, dtype=torch.bool))


def image_model(randomised: Randomise, **overrides: Any) -> Any:
    model = create_model("TextDiT-Tiny/2", input_size=8, **overrides)
    randomised(model)
    return model.double().eval()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_a_clip_of_one_frame_is_an_image(table: str, size: tuple[int, int], randomised: Randomise, y: Captions) -> None:
    image = image_model(randomised, **TABLES[table])
    video, x = inflate(image, (5, 8, 8)), torch.randn(2, 4, *size, dtype=torch.float64)
    out = video(x.unsqueeze(2), T, y, patch_size=2)
    torch.testing.assert_close(out.squeeze(2), image(x, T, y, patch_size=2))


def test_each_frame_of_a_clip_that_stands_still_is_the_image(randomised: Randomise, y: Captions) -> None:
    image = image_model(randomised, position_table="learned")
    video, x = inflate(image, (5, 8, 8)), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    still = x.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    expected = image(x, T, y, patch_size=2)
    for frame in video(still, T, y, patch_size=2).unbind(2):
        torch.testing.assert_close(frame, expected)


@pytest.mark.parametrize("table", TABLES)
def test_positions_of_another_latent_size_are_those_of_the_image_model(table: str, randomised: Randomise) -> None:
    image = image_model(randomised, **TABLES[table])
    video = inflate(image, (3, 12, 16))
    base = image.base_patch_size
    torch.testing.assert_close(video.positions(base, (1, 12, 16)), image.positions(base, (12, 16)))


def test_the_image_model_stays_as_it_is_and_everything_of_the_clip_model_trains(randomised: Randomise) -> None:
    image = image_model(randomised, position_table="learned")
    before = {name: tensor.clone() for name, tensor in image.state_dict().items()}
    video = inflate(image, (5, 8, 8))
    with torch.no_grad():
        for parameter in video.parameters():
            parameter.zero_()
    assert all(torch.equal(image.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in video.parameters())


def test_what_is_no_image_model_is_refused(randomised: Randomise) -> None:
    image = image_model(randomised)
    with pytest.raises(ValueError, match="takes clips already"):
        inflate(inflate(image, (5, 8, 8)), (5, 8, 8))
    with pytest.raises(ValueError, match="is flexible"):
        inflate(flexify(image, [4]), (5, 8, 8))
    with pytest.raises(ValueError, match=r"a size \(F, H, W\), got \(8, 8\)"):
        inflate(image, (8, 8))


def test_a_config_starts_a_variant_of_clips_from_an_image_model(
    randomised: Randomise, y: Captions, tmp_path: Path
) -> None:
    overrides = {"hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 4}
    image: Any = randomised(create_model("VideoDiT-Tiny", input_size=8, **overrides))
    path = str(save_checkpoint(image, tmp_path / "image.safetensors"))
    overrides |= {"input_size": [5, 8, 8]}  # type: ignore[dict-item]
    video = TargetSettings("VideoDiT-Tiny", overrides, inflate_from=path).build().eval()
    x = torch.randn(2, 4, 1, 8, 8)
    expected = image.eval()(x.squeeze(2), T, y, patch_size=2)
    torch.testing.assert_close(video(x, T, y, patch_size=2).squeeze(2), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has depth=2, but target.variant and target.overrides say 3"):
        TargetSettings("VideoDiT-Tiny", {**overrides, "depth": 3}, inflate_from=path).build()
    with pytest.raises(ValueError, match="give target.variant and no checkpoint"):
        TargetSettings("VideoDiT-Tiny", overrides, checkpoint=path, inflate_from=path).build()
