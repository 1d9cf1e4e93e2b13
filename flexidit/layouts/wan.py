"""Wan 2.1's public layouts: the original one, nearly with our names, and ``diffusers.WanTransformer3DModel``.

Neither holds positions, which are rotations that follow from indices, nor a null caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from flexidit.config import WanConfig
from flexidit.patch_size import PatchSize

StateDict = Mapping[str, Tensor]

CLASS_NAME = "WanTransformer3DModel"
OFFICIAL_CLASS: str | None = "WanModel"
BLOCKS, EMBEDDING, FINAL_LINEAR = "blocks", "patch_embedding", "proj_out"
ADAPTED: Mapping[str, tuple[str, ...]] = {
    "self_attn.q": ("attn1.to_q",),
    "self_attn.k": ("attn1.to_k",),
    "self_attn.v": ("attn1.to_v",),
    "self_attn.o": ("attn1.to_out.0",),
    "ffn.0": ("ffn.net.0.proj",),
    "ffn.2": ("ffn.net.2",),
}
BESIDE: Mapping[str, str] = {}
UNTOLD_BY_SHAPES: tuple[str, ...] = ("num_heads", "input_size")
UNTOLD_BY_DIFFUSERS: tuple[str, ...] = ("input_size", "caption_length", "time_shift")

_HEAD_SIZE = 128  # of all published models (Wan Team 2025)
_OURS, _OFFICIAL = "patch_embedding.proj.", "patch_embedding."
# ours -> diffusers, outside the blocks
_OUTER = {
    "patch_embedding.proj": EMBEDDING,
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": FINAL_LINEAR,
}
# ours -> diffusers, inside block i
_ATTENTION = {"self_attn": "attn1", "cross_attn": "attn2"}
_BLOCK = {
    **{f"{a}.{x}": f"{b}.to_{x}" for a, b in _ATTENTION.items() for x in "qkv"},
    **{f"{a}.o": f"{b}.to_out.0" for a, b in _ATTENTION.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_SCALES = {f"{a}.norm_{x}": f"{b}.norm_{x}" for a, b in _ATTENTION.items() for x in "qk"}  # have no bias
_FIXED = {  # what a Wan always has, as diffusers' arguments say it, with the default of each
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "freq_dim": 256,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
_REFUSED = "these weights are of an image-to-video Wan, and only text-to-video ones are known here; take a T2V model"


def is_official(state: StateDict) -> bool:
    """Whether the names are those of a Wan."""
    return "time_projection.1.weight" in state


def told_by_official(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that the ``config.json`` of an original directory tells, and no shape."""
    names = {"num_heads": "num_heads", "eps": "norm_eps", "text_len": "caption_length"}
    return {ours: values[theirs] for theirs, ours in names.items() if theirs in values}


def config_from_official(state: StateDict, *, num_heads: int | None = None, **overrides: Any) -> WanConfig:
    """Read a config off the shapes of an original state dict.

    Args:
        num_heads: no shape tells it; None takes heads of 128 channels, as all published models have.
        **overrides: fields that are not told either, ``input_size`` above all, which no weight depends on.

    Raises:
        ValueError: an image-to-video model, another Wan that is not known here, or a width of no published one.
    """
    if any(name.startswith("img_emb.") or ".k_img." in name for name in state):
        raise ValueError(_REFUSED)
    if "blocks.0.norm3.weight" not in state:
        raise ValueError("these weights have no norm before cross-attention (blocks.0.norm3), which Wans here have")
    hidden_size, in_channels, *sides = state["patch_embedding.weight"].shape
    patch_size = PatchSize(*sides)
    if state["head.head.weight"].shape[0] != in_channels * patch_size.volume:
        raise ValueError(_REFUSED)
    if num_heads is None and hidden_size % _HEAD_SIZE:
        raise ValueError(f"no published Wan has hidden size {hidden_size}; give num_heads")
    values: dict[str, Any] = {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": num_heads or hidden_size // _HEAD_SIZE,
        "mlp_ratio": state["blocks.0.ffn.0.weight"].shape[0] / hidden_size,
        "caption_channels": state["text_embedding.0.weight"].shape[1],
    }
    return WanConfig(**{**values, **overrides})


def from_official(state: StateDict) -> dict[str, Tensor]:
    """An original state dict by our names."""
    return {name.replace(_OFFICIAL, _OURS): tensor for name, tensor in state.items()}


def to_official(state: StateDict) -> dict[str, Tensor]:
    """Inverse of :func:`from_official`."""
    return {name.replace(_OURS, _OFFICIAL): tensor for name, tensor in state.items()}


def config_from_diffusers(values: Mapping[str, Any]) -> WanConfig:
    """From the ``config.json`` of a ``WanTransformer3DModel``, whose own defaults fill it up.

    Raises:
        ValueError: an image-to-video model, or an argument of diffusers' class that ours has no counterpart of.
    """
    in_channels, heads = values.get("in_channels", 16), values.get("num_attention_heads", 40)
    has_images = values.get("image_dim") is not None or values.get("added_kv_proj_dim") is not None
    if has_images or (values.get("out_channels", 16) or in_channels) != in_channels:
        raise ValueError(_REFUSED)
    for name, value in _FIXED.items():
        if values.get(name, value) != value:
            raise ValueError(f"diffusers' Wan with {name}={values[name]!r} has no counterpart here, only {value!r}")
    hidden_size = heads * values.get("attention_head_dim", 128)
    return WanConfig(
        patch_size=PatchSize(*values.get("patch_size", (1, 2, 2))),
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=values.get("num_layers", 40),
        num_heads=heads,
        mlp_ratio=values.get("ffn_dim", 13824) / hidden_size,
        caption_channels=values.get("text_dim", 4096),
        norm_eps=values.get("eps", 1e-6),
    )


def config_to_diffusers(config: WanConfig) -> dict[str, Any]:
    """Arguments of ``diffusers.WanTransformer3DModel``.

    Raises:
        ValueError: a model that diffusers' class cannot express; the sentence says why.
    """
    size = config.patch_size
    if config.flex is not None:
        raise ValueError("diffusers' Wan has one patch size; merge or pick one of this model first")
    if config.position_unit is not None:
        raise ValueError(
            f"diffusers' Wan puts patches at their index, and those of size {size.name} of this model sit at "
            f"{config.placement!r}: flexify with positions='grid' for that"
        )
    if any(length % side for length, side in zip(config.input_size, size.as_tuple(), strict=True)):
        clip = "x".join(map(str, config.input_size))
        raise ValueError(
            f"diffusers' Wan takes whole patches, and {size.name} does not divide latent clips of {clip}: choose "
            "another patch size, or say with --input-size FxHxW for which clips it is meant"
        )
    return {
        "patch_size": list(size.as_tuple()),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "text_dim": config.caption_channels,
        "ffn_dim": config.mlp_width,
        "num_layers": config.depth,
        "eps": config.norm_eps,
        "rope_max_seq_len": 1024,
        **_FIXED,
    }


def to_diffusers(state: StateDict, depth: int) -> dict[str, Tensor]:
    """Our state dict in diffusers' layout."""
    return {theirs: state[ours] for ours, theirs in _pairs(depth)}


def from_diffusers(state: StateDict, depth: int) -> dict[str, Tensor]:
    """Inverse of :func:`to_diffusers`."""
    return {ours: state[theirs] for ours, theirs in _pairs(depth)}


def own_unit(config: WanConfig) -> WanConfig:
    """The config as it is: a Wan has no scale of positions."""
    return config


def size_arguments(config: WanConfig) -> dict[str, Any]:
    """diffusers' arguments, beside the patch size, that put patches where they belong: there are none."""
    return {}


def with_beside(config: WanConfig, tensors: Mapping[str, Tensor]) -> WanConfig:
    """The config as it is: nothing stands beside diffusers' weights."""
    return config


def held_otherwise(config: WanConfig, in_diffusers: bool) -> set[str]:
    """Fields whose difference makes none: the rate of dropped captions matters in training only."""
    return {"class_dropout_prob"}


def _pairs(depth: int) -> Iterator[tuple[str, str]]:
    """(our name, diffusers' name) of each tensor, all of which are the same in both."""
    layers = {**_OUTER, **{f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(depth) for a, b in _BLOCK.items()}}
    yield from ((f"{a}.{kind}", f"{b}.{kind}") for a, b in layers.items() for kind in ("weight", "bias"))
    yield "head.modulation", "scale_shift_table"
    for i in range(depth):
        yield f"blocks.{i}.modulation", f"blocks.{i}.scale_shift_table"
        yield from ((f"blocks.{i}.{a}.weight", f"blocks.{i}.{b}.weight") for a, b in _SCALES.items())
