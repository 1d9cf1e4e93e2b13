"""DiT's public layouts: the official one, whose names are ours, and that of ``diffusers.DiTTransformer2DModel``.

Shape legend: D hidden size, O output channels, P positions under one patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flexidit.config import DiTConfig
from flexidit.patch_size import PatchSize

StateDict = Mapping[str, Tensor]

CLASS_NAME = "DiTTransformer2DModel"
OFFICIAL_CLASS: str | None = None
BLOCKS, EMBEDDING, FINAL_LINEAR = "transformer_blocks", "pos_embed.proj", "proj_out_2"
ADAPTED: Mapping[str, tuple[str, ...]] = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),  # one adapter becomes three that share their first factor
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
BESIDE: Mapping[str, str] = {}
UNTOLD_BY_SHAPES: tuple[str, ...] = ("num_heads", "input_size")
UNTOLD_BY_DIFFUSERS: tuple[str, ...] = ("process", "time_shift")

_PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # hidden_size -> num_heads (Peebles and Xie 2023, table 1)

# ours -> diffusers, outside the blocks
_OUTER = {
    "x_embedder.proj": EMBEDDING,
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": FINAL_LINEAR,
}
# ours -> diffusers, inside block i; attn.qkv is split there into to_q, to_k and to_v
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# ours -> diffusers, of which every block there holds a copy
_CONDITIONING = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}


def is_official(state: StateDict) -> bool:
    """Whether the names are those of a DiT."""
    return "final_layer.adaLN_modulation.1.weight" in state


def told_by_official(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: official weights are single files."""
    return {}


def from_official(state: StateDict) -> dict[str, Tensor]:
    """The state dict as it is: official names are ours."""
    return dict(state)


def to_official(state: StateDict) -> dict[str, Tensor]:
    """Inverse of :func:`from_official`."""
    return dict(state)


def config_from_official(state: StateDict, *, num_heads: int | None = None, **overrides: Any) -> DiTConfig:
    """Read a config off the shapes of an official state dict.

    Args:
        num_heads: no shape tells it; None takes the published one of this hidden size.
        **overrides: fields that shapes cannot tell either, such as a non-square ``input_size``.

    Raises:
        ValueError: not a DiT, or a hidden size that no published model has and no ``num_heads``.
    """
    if "x_embedder.proj.weight" not in state or "pos_embed" not in state:
        raise ValueError("these weights are not a DiT's: x_embedder.proj.weight or pos_embed is missing")
    hidden_size, in_channels, height, width = state["x_embedder.proj.weight"].shape
    if num_heads is None and hidden_size not in _PUBLISHED_HEADS:
        raise ValueError(f"no published DiT has hidden size {hidden_size}; give num_heads")
    side = math.isqrt(state["pos_embed"].shape[1])
    values: dict[str, Any] = {
        "input_size": (side * height, side * width),
        "patch_size": PatchSize(1, height, width),
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": num_heads or _PUBLISHED_HEADS[hidden_size],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * in_channels * height * width,
    }
    return DiTConfig(**{**values, **overrides})


def config_from_diffusers(values: Mapping[str, Any]) -> DiTConfig:
    """From the ``config.json`` of a ``DiTTransformer2DModel``."""
    heads, side = values["num_attention_heads"], values["patch_size"]
    in_channels = values["in_channels"]
    return DiTConfig(
        input_size=(values["sample_size"], values["sample_size"]),
        patch_size=PatchSize(1, side, side),
        in_channels=in_channels,
        hidden_size=heads * values["attention_head_dim"],
        depth=values["num_layers"],
        num_heads=heads,
        num_classes=values["num_embeds_ada_norm"],
        learn_sigma=(values.get("out_channels") or in_channels) == 2 * in_channels,
        frequency_shift=1,
        mlp_norm_eps=values.get("norm_eps", 1e-5),
    )


def config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """Arguments of ``diffusers.DiTTransformer2DModel``.

    Raises:
        ValueError: a model that diffusers' class cannot express.
    """
    height, width = config.input_size
    square = height == width and config.patch_size.h == config.patch_size.w
    if not square or config.mlp_ratio != 4.0 or config.class_dropout_prob == 0 or config.flex is not None:
        raise ValueError(
            "diffusers' DiT has one square input, one square patch size, mlp_ratio 4 and a null label; "
            "this model differs (merge or pick one patch size of a flexible model first)"
        )
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "num_layers": config.depth,
        "sample_size": height,
        "patch_size": config.patch_size.h,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
    }


def own_unit(config: DiTConfig) -> DiTConfig:
    """The config as it is: a DiT has no scale of positions, so patches elsewhere than at their index stay so."""
    return config


def size_arguments(config: DiTConfig) -> dict[str, Any]:
    """diffusers' arguments, beside the patch size, that put patches where they belong: there are none."""
    return {"interpolation_scale": None}


def with_beside(config: DiTConfig, tensors: Mapping[str, Tensor]) -> DiTConfig:
    """The config as it is: nothing stands beside diffusers' weights."""
    return config


def held_otherwise(config: DiTConfig, in_diffusers: bool) -> set[str]:
    """Fields whose difference makes none: that there is a null label is held, its rate matters in training only."""
    return {"class_dropout_prob"} if config.class_dropout_prob else set()


def to_diffusers(state: StateDict, depth: int) -> dict[str, Tensor]:
    """Our state dict in diffusers' layout; positions are not part of it, the label table is repeated in each block."""
    out: dict[str, Tensor] = {}
    for ours, theirs in _pairs(depth):
        out[theirs] = state[ours]
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                out[f"transformer_blocks.{i}.attn1.to_{name}.{kind}"] = part.clone()
        for ours, theirs in _CONDITIONING.items():
            out[f"transformer_blocks.{i}.norm1.emb.{theirs}"] = state[ours].clone()
    return out


def from_diffusers(state: StateDict, depth: int) -> dict[str, Tensor]:
    """Inverse of :func:`to_diffusers`, but for ``pos_embed``, which follows from the config.

    Raises:
        ValueError: blocks with different timestep or label embeddings, which our model cannot hold.
    """
    out = {ours: state[theirs] for ours, theirs in _pairs(depth)}
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [state[f"transformer_blocks.{i}.attn1.to_{name}.{kind}"] for name in "qkv"]
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for ours, theirs in _CONDITIONING.items():
        copies = [state[f"transformer_blocks.{i}.norm1.emb.{theirs}"] for i in range(depth)]
        if any(not copy.is_meta and not torch.equal(copy, copies[0]) for copy in copies):
            raise ValueError(f"the blocks of these weights have different {theirs}; only equal ones can be converted")
        out[ours] = copies[0]
    return out


def _pairs(depth: int) -> Iterator[tuple[str, str]]:
    """(our name, diffusers' name) of each tensor that is the same in both."""
    for kind in ("weight", "bias"):
        for ours, theirs in _OUTER.items():
            yield f"{ours}.{kind}", f"{theirs}.{kind}"
        for i in range(depth):
            for ours, theirs in _BLOCK.items():
                yield f"blocks.{i}.{ours}.{kind}", f"transformer_blocks.{i}.{theirs}.{kind}"
