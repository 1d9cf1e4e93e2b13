"""PixArt's public layouts: the official one, whose names are ours, and ``diffusers.PixArtTransformer2DModel``.

diffusers' layout has no null caption: its pipelines encode an empty prompt instead. Ours stands beside its weights in
a file of its own, which diffusers does not look at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexidit.config import TextDiTConfig
from flexidit.patch_size import PatchSize
from flexidit.positions import sincos_2d

StateDict = Mapping[str, Tensor]

CLASS_NAME = "PixArtTransformer2DModel"
OFFICIAL_CLASS: str | None = None
BLOCKS, EMBEDDING, FINAL_LINEAR = "transformer_blocks", "pos_embed.proj", "proj_out"
ADAPTED: Mapping[str, tuple[str, ...]] = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),  # one adapter becomes three that share their first factor
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
NULL_CAPTION = "y_embedder.y_embedding"
"""The one tensor that diffusers' layout has no place for."""
BESIDE: Mapping[str, str] = {"null_caption.safetensors": NULL_CAPTION}
UNTOLD_BY_SHAPES: tuple[str, ...] = ("num_heads", "input_size", "position_scale")
UNTOLD_BY_DIFFUSERS: tuple[str, ...] = ("caption_length", "pixels_per_latent", "process", "time_shift")

_PUBLISHED_HEADS = {1152: 16}  # hidden_size -> num_heads (Chen et al. 2023, PixArt-XL/2)
_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_SAME_TABLE = 0.01  # half precision rounds a sine by 0.004 at most; tables of two scales differ by more than 0.5

# ours -> diffusers, outside the blocks
_OUTER = {
    "x_embedder.proj": EMBEDDING,
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": FINAL_LINEAR,
}
_MICRO = {
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
}
# ours -> diffusers, inside block i
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# ours -> diffusers, whose layers are ours cut into equal parts
_CUT = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
_FIXED = {  # what a TextDiT always has, as diffusers' arguments say it, with the default of each
    "norm_eps": 1e-6,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
}


def is_official(state: StateDict) -> bool:
    """Whether the names are those of a PixArt."""
    return "t_block.1.weight" in state


def told_by_official(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: official weights are single files."""
    return {}


def from_official(state: StateDict) -> dict[str, Tensor]:
    """The state dict as it is: official names are ours."""
    return dict(state)


def to_official(state: StateDict) -> dict[str, Tensor]:
    """Inverse of :func:`from_official`.

    Raises:
        ValueError: of a model of clips, which no official layout has.
    """
    if state["x_embedder.proj.weight"].dim() == 5:
        raise ValueError("the official layout has no models of clips; use layout_format='flexidit'")
    return dict(state)


def config_from_official(state: StateDict, *, num_heads: int | None = None, **overrides: Any) -> TextDiTConfig:
    """Read a config off the shapes of an official state dict, and the scale of positions off its ``pos_embed``.

    Args:
        num_heads: no shape tells it, but for models with qk-norm; None takes the published one of this hidden size.
        **overrides: fields that are not told either: a non-square ``input_size``; without ``pos_embed``, which
            PixArt's own loaders drop, any; ``position_scale``, else that of PixArt's models of this size.

    Raises:
        ValueError: not a PixArt, one that compresses keys and values, or one that leaves something open.
    """
    _refuse_unknown_attention(state)
    if state["x_embedder.proj.weight"].dim() == 5:
        raise ValueError(
            "these weights are of a model of clips, and no shape tells its config: keep it in flexidit's own layout"
        )
    hidden_size, in_channels, height, width = state["x_embedder.proj.weight"].shape
    null, patch_size = state.get(NULL_CAPTION), PatchSize(1, height, width)
    values: dict[str, Any] = {
        "input_size": overrides.get("input_size") or _input_size(state, patch_size),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": num_heads or _num_heads(state, hidden_size),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * in_channels * height * width,
        "caption_channels": state["y_embedder.y_proj.fc1.weight"].shape[1],
        "null_caption": null is not None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "micro_conditions": "csize_embedder.mlp.0.weight" in state,
    }
    if null is not None:
        values["caption_length"] = len(null)
    values |= _positions(state.get("pos_embed"), patch_size.grid(values["input_size"])[1:], values["input_size"])
    return TextDiTConfig(**{**values, **overrides})


def config_from_diffusers(values: Mapping[str, Any]) -> TextDiTConfig:
    """From the ``config.json`` of a ``PixArtTransformer2DModel``, whose own defaults fill it up.

    Raises:
        ValueError: an argument of diffusers' class that our model has no counterpart of.
    """
    heads, side = values.get("num_attention_heads", 16), values.get("patch_size", 2)
    hidden_size = heads * values.get("attention_head_dim", 72)
    _refuse_unknown_arguments(values, hidden_size)
    sample_size, in_channels = values.get("sample_size", 128), values.get("in_channels", 4)
    scale, micro = values.get("interpolation_scale"), values.get("use_additional_conditions")
    out_channels = values.get("out_channels", 8)
    return TextDiTConfig(
        input_size=(sample_size, sample_size),
        patch_size=PatchSize(1, side, side),
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=values.get("num_layers", 28),
        num_heads=heads,
        learn_sigma=out_channels == 2 * in_channels,
        caption_channels=values["caption_channels"],
        null_caption=False,
        position_scale=_published_scale(sample_size) if scale is None else float(scale),
        micro_conditions=sample_size == 128 if micro is None else micro,
    )


def config_to_diffusers(config: TextDiTConfig) -> dict[str, Any]:
    """Arguments of ``diffusers.PixArtTransformer2DModel``.

    Raises:
        ValueError: a model that diffusers' class cannot express; the sentence says why.
    """
    if config.flex is not None:
        raise ValueError("diffusers' PixArt has one patch size; merge or pick one of this model first")
    reason = _inexpressible(config)
    if reason:
        raise ValueError(f"diffusers' PixArt cannot express this model: {reason}; the official and our own layout can")
    scale = own_unit(config).position_scale
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "cross_attention_dim": config.hidden_size,
        "sample_size": config.input_size[0],
        "patch_size": config.patch_size.h,
        "interpolation_scale": int(scale) if scale.is_integer() else scale,
        "use_additional_conditions": config.micro_conditions,
        "caption_channels": config.caption_channels,
        **_FIXED,
    }


def own_unit(config: TextDiTConfig) -> TextDiTConfig:
    """The same positions, told in units of the model's own patches where that is possible.

    The first base patches under weak ones, ``2 * i``, are the indices ``i`` at half the scale.
    """
    unit, own = config.position_unit, config.patch_size
    if unit is None or config.placement != "corners" or own.h * unit.w != own.w * unit.h:
        return config
    scale = config.position_scale * unit.h / own.h
    return replace(config, position_unit=None, placement="coords", position_scale=scale)


def size_arguments(config: TextDiTConfig) -> dict[str, Any]:
    """diffusers' arguments, beside the patch size, that put patches where they belong; None: no scale does."""
    own = own_unit(config)
    return {"interpolation_scale": own.position_scale if own.position_unit is None else None}


def with_beside(config: TextDiTConfig, tensors: Mapping[str, Tensor]) -> TextDiTConfig:
    """The config of weights that have the tensors of ``BESIDE`` too."""
    null = tensors.get(NULL_CAPTION)
    return config if null is None else replace(config, null_caption=True, caption_length=len(null))


def held_otherwise(config: TextDiTConfig, in_diffusers: bool) -> set[str]:
    """Fields whose difference makes none: the rate of dropped captions, and what the file of the null caption tells."""
    null = {"null_caption", "caption_length"} if config.null_caption and in_diffusers else set()
    return {"class_dropout_prob", *null}


def to_diffusers(state: StateDict, depth: int) -> dict[str, Tensor]:
    """Our state dict in diffusers' layout, which holds neither positions nor the null caption."""
    out = {theirs: state[ours] for ours, theirs in _pairs(state, depth)}
    for ours, parts in _cuts(depth):
        for name, part in zip(parts, state[ours].chunk(len(parts)), strict=True):
            out[name] = part.clone()
    return out


def from_diffusers(state: StateDict, depth: int) -> dict[str, Tensor]:
    """Inverse of :func:`to_diffusers`."""
    out = {ours: state[theirs] for ours, theirs in _pairs(state, depth)}
    return out | {ours: torch.cat([state[name] for name in parts]) for ours, parts in _cuts(depth)}


def _pairs(state: StateDict, depth: int) -> Iterator[tuple[str, str]]:
    """(our name, diffusers' name) of each tensor that is the same in both."""
    has_micro = any("csize_embedder" in name or "resolution_embedder" in name for name in state)
    layers = {**_OUTER, **(_MICRO if has_micro else {})}
    layers |= {f"blocks.{i}.{a}": f"transformer_blocks.{i}.{b}" for i in range(depth) for a, b in _BLOCK.items()}
    yield from ((f"{a}.{kind}", f"{b}.{kind}") for a, b in layers.items() for kind in ("weight", "bias"))
    yield "final_layer.scale_shift_table", "scale_shift_table"
    for i in range(depth):
        yield f"blocks.{i}.scale_shift_table", f"transformer_blocks.{i}.scale_shift_table"


def _cuts(depth: int) -> Iterator[tuple[str, list[str]]]:
    """(our name, diffusers' names) of each tensor that is cut there."""
    for i in range(depth):
        for kind in ("weight", "bias"):
            for ours, parts in _CUT.items():
                yield f"blocks.{i}.{ours}.{kind}", [f"transformer_blocks.{i}.{part}.{kind}" for part in parts]


def _refuse_unknown_attention(state: StateDict) -> None:
    if any(".attn.sr." in name for name in state):
        raise ValueError(
            "these weights compress the keys and values of self-attention (PixArt-Sigma's kv-compress), which no "
            "model here does; take a PixArt without it"
        )
    norm = state.get("blocks.0.attn.q_norm.weight")
    if norm is not None and len(norm) == state["x_embedder.proj.weight"].shape[0]:
        raise ValueError("these weights normalise queries over all heads at once; the qk_norm here is head by head")


def _refuse_unknown_arguments(values: Mapping[str, Any], hidden_size: int) -> None:
    found = {**_FIXED, "cross_attention_dim": 1152, **values}
    for name, value in {**_FIXED, "cross_attention_dim": hidden_size}.items():
        if found[name] != value:
            raise ValueError(f"diffusers' PixArt with {name}={found[name]!r} has no counterpart here, only {value!r}")
    if values.get("caption_channels") is None:
        raise ValueError("diffusers' PixArt without caption_channels has no caption projection, which models here need")


def _num_heads(state: StateDict, hidden_size: int) -> int:
    norm = state.get("blocks.0.attn.q_norm.weight")
    if norm is not None:
        return hidden_size // len(norm)
    if hidden_size not in _PUBLISHED_HEADS:
        raise ValueError(f"no published PixArt has hidden size {hidden_size}; give num_heads")
    return _PUBLISHED_HEADS[hidden_size]


def _input_size(state: StateDict, patch_size: PatchSize) -> tuple[int, int]:
    """Off the table of positions; without one, only the 1024 px model gives itself away."""
    table = state.get("pos_embed")
    if table is None and "csize_embedder.mlp.0.weight" in state:
        return 128, 128
    if table is None:
        raise ValueError(
            "these weights have no pos_embed, which tells the latent size; give input_size, such as 32 for 256 px, "
            "64 for 512 px or 128 for 1024 px"
        )
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise ValueError(f"pos_embed has {table.shape[1]} positions, which is no square; give input_size as (H, W)")
    return side * patch_size.h, side * patch_size.w


def _positions(table: Tensor | None, grid: tuple[int, ...], input_size: tuple[int, ...]) -> dict[str, Any]:
    """Which function the positions are: of indices divided by a scale, or none, and then they were learned."""
    if table is None or table.is_meta or table.shape[1] != math.prod(grid):
        return {"position_scale": _published_scale(min(input_size))}
    rows, columns = (torch.arange(count, dtype=torch.float64) for count in grid)
    for scale in _SCALES:
        computed = sincos_2d(rows / scale, columns / scale, table.shape[2])
        if torch.allclose(table[0].double(), computed, atol=_SAME_TABLE, rtol=0):
            return {"position_scale": scale}
    return {"position_table": "learned"}


def _published_scale(sample_size: int) -> float:
    """PixArt's positions span at most what they did at 512 px; diffusers' rule too."""
    return float(max(sample_size // 64, 1))


def _inexpressible(config: TextDiTConfig) -> str:
    """Why diffusers' class cannot hold a model; empty if it can."""
    if config.is_video:
        return "it takes clips"
    (height, width), size = config.input_size, config.patch_size
    if config.mlp != "gelu":
        return f"its perceptrons are {config.mlp}"
    if config.qk_norm:
        return "it normalises queries and keys"
    if not config.computes_positions:
        return "its positions are learned"
    if height != width or size.h != size.w:
        return f"its input {height}x{width} or its patch size {size.name} is not square"
    if height % size.h:
        return f"it takes whole patches, not {size.name} on {height}x{width}"
    if config.mlp_ratio != 4.0:
        return f"its mlp_ratio is {config.mlp_ratio:g}, not 4"
    if own_unit(config).position_unit is not None:
        return (
            f"its patches of size {size.name} sit at their centres, which no scale of their indices gives (flexify "
            "with positions='corners' for that)"
        )
    return ""
