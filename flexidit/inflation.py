"""An image model's weights as the start of a model of clips.

Spatial patches, attention and captions are those of the image model, and tokens of all frames attend to one another. A
one-frame clip then gets the image model's prediction; with learned positions, whose table along time starts at zero,
so does each frame of any clip that stands still, because attention to copies of a token is attention to the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, cast

import torch

from flexidit.models import plain_model
from flexidit.models.positioned import PositionedTransformer
from flexidit.patch_embed import as_3d

Model = TypeVar("Model", bound=PositionedTransformer)


@torch.no_grad()
def inflate(image_model: Model, input_size: Sequence[int]) -> Model:
    """A model of clips with the weights of an image model.

    Args:
        image_model: a plain model; it stays as it is.
        input_size: (F, H, W) of the clips, in latents. Positions in space are those that the image model has at (H, W).

    Raises:
        ValueError: the model takes clips already or is flexible, or the size is not that of clips.
    """
    config, size = image_model.config, tuple(input_size)
    if config.is_video or config.flex is not None:
        kind = "takes clips already" if config.is_video else "is flexible: inflate its target, then flexify"
        raise ValueError(f"this model {kind}; only plain image models are inflated")
    if len(size) != 3:
        raise ValueError(f"clips have a size (F, H, W), got {size}")
    with torch.device("meta"):
        model = plain_model(replace(config, input_size=size))
    state = dict(image_model.state_dict())
    kernel = f"{config.embedding_name}.proj.weight"
    state[kernel] = as_3d(state[kernel])
    state["pos_embed"] = image_model.positions(image_model.base_patch_size, size[1:])
    if not config.computes_positions:
        frames = config.patch_size.grid(size)[0]
        state["pos_embed_time"] = state["pos_embed"].new_zeros(1, frames, config.hidden_size)
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    model.thaw()
    model.reset_derived()
    return cast(Model, model.train(image_model.training))
