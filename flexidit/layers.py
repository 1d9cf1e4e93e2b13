"""The parts of a transformer block, each told the patch sizes of the call.

The sizes are an explicit argument down to here, in a :class:`TokenLayout`, because activation checkpointing runs a
block again during backward: a switch set from outside would by then belong to another call, and the gradients would be
wrong without an error.

A pass has one or more segments, each a batch of sequences of one patch size. The tokens of one segment are (N, T, D).
Those of several are *joined*, (S, D), one sequence after another, so that a linear layer reads its weights once for
all of them; what differs between segments is done to the parts. Conditioning vectors are (M, D), one a sequence.

Shape legend: N sequences of a segment, M of all, T tokens of a sequence, S of all, D hidden size, R adapter rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.mlp import GluMlp
from timm.layers.mlp import Mlp as PlainMlp
from torch import Tensor, nn

from flexidit.patch_embed import PatchUnembed
from flexidit.patch_size import PatchSize
from flexidit.token_layout import TokenLayout

Masks = Sequence[Tensor | None]
"""For each item of ``TokenLayout.rows``, which key (second axis) a query may see: (L, L) bool; ``None``: every one."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Per-sample affine map of the tokens: (N, T, D), (N, D), (N, D) -> (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def at_least(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as it is, or widened to a floating-point type that holds more."""
    return x.to(torch.promote_types(x.dtype, dtype))


def adapted_linear(layer: Any, x: Tensor, patch_size: PatchSize) -> Tensor:
    """A linear layer, plus the low-rank adapter of ``patch_size`` where ``lora.py`` has attached one.

    Reads the parameters that peft holds, and none of its state: the active adapter is an argument here, so nothing
    needs switching back, and a size without adapter runs the pre-trained layer bit for bit.
    """
    if not hasattr(layer, "lora_A"):
        return layer(x)
    return _add_adapter(layer, layer.base_layer(x), x, patch_size)


def _add_adapter(layer: Any, out: Tensor, x: Tensor, patch_size: PatchSize) -> Tensor:
    name = patch_size.name
    if name not in layer.lora_A:
        return out
    down, up = layer.lora_A[name], layer.lora_B[name]
    delta = up(down(layer.lora_dropout[name](x.to(down.weight.dtype))))  # (N, T, R) -> (N, T, D)
    return out + (delta * layer.scaling[name]).to(out.dtype)


def split_tokens(x: Tensor, layout: TokenLayout) -> Sequence[Tensor]:
    """The segments of joined tokens, as views: (S, D) -> (N, T, D) each; a single segment is not joined."""
    if len(layout.segments) == 1:
        return [x]
    shapes = [(segment.num_sequences, segment.num_tokens) for segment in layout.segments]
    parts = x.split([num_sequences * num_tokens for num_sequences, num_tokens in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def join_tokens(parts: Iterable[Tensor]) -> Tensor:
    """Inverse of :func:`split_tokens`."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, 1) for part in parts])


def joint_linear(layer: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    """:func:`adapted_linear` over all segments: the layer once, on joined tokens, and to each part its own adapter."""
    if len(layout.segments) == 1:
        return adapted_linear(layer, x, layout.segments[0].patch_size)
    if not hasattr(layer, "lora_A"):
        return layer(x)
    parts = zip(split_tokens(layer.base_layer(x), layout), split_tokens(x, layout), layout.segments, strict=True)
    return join_tokens(_add_adapter(layer, out, part, segment.patch_size) for out, part, segment in parts)


def split_vectors(c: Tensor, layout: TokenLayout) -> Sequence[Tensor]:
    """One vector a sequence, by segment: (M, D) -> (N, D) each."""
    return [c] if len(layout.segments) == 1 else c.split([segment.num_sequences for segment in layout.segments])


def join_vectors(parts: Iterable[Tensor]) -> Tensor:
    """Inverse of :func:`split_vectors`."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attention_masks(layout: TokenLayout, device: torch.device) -> Masks:
    """What the blocks of a row may see of one another: nothing.

    Boolean, because attention would add a mask of zeros and ones to the scores, and every token would see every other.
    """
    return [None if len(rows.blocks) == 1 else _block_diagonal(rows.blocks, device) for rows in layout.rows]


def _block_diagonal(blocks: Sequence[int], device: torch.device) -> Tensor:
    return torch.block_diag(*[torch.ones(n, n, dtype=torch.bool, device=device) for n in blocks])


def in_rows(
    attend: Callable[..., Tensor], inputs: Sequence[Sequence[Tensor]], layout: TokenLayout, masks: Masks
) -> list[Tensor]:
    """Self-attention of all segments, row by row: (N, T, D) each.

    Args:
        attend: takes the inputs of equal rows, (rows, L, ...) each, and their mask: -> (rows, L, D).
        inputs: such as queries, keys and values, each (N, T, ...) for every segment.
    """
    out: dict[int, Tensor] = {}
    for rows, mask in zip(layout.rows, masks, strict=True):
        shapes = {i: inputs[0][i].shape[:2] for i in rows.segments}
        parts = [[own[i].reshape(rows.num_rows, -1, *own[i].shape[2:]) for i in rows.segments] for own in inputs]
        x = attend(*[own[0] if len(own) == 1 else torch.cat(own, dim=1) for own in parts], mask)  # (rows, L, D)
        lengths = [part.shape[1] for part in parts[0]]
        for (i, shape), part in zip(shapes.items(), x.split(lengths, dim=1), strict=True):
            out[i] = part.reshape(*shape, -1)
    return [out[i] for i in range(len(layout.segments))]


class SizeNorm(nn.Module):
    """Layer norm, plain at the base patch size; other sizes may have a scale and a shift (paper, section 3.1).

    The base size keeps the plain norm so that the pre-trained function is preserved (READING.md, gap 6).
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.scale = nn.ParameterDict()
        self.shift = nn.ParameterDict()

    def add_size(self, patch_size: PatchSize, like: Tensor) -> None:
        """Give ``patch_size`` an identity scale and shift, with dtype and device of ``like``."""
        self.scale[patch_size.name] = nn.Parameter(like.new_ones(self.hidden_size))
        self.shift[patch_size.name] = nn.Parameter(like.new_zeros(self.hidden_size))

    def forward(self, x: Tensor, *, patch_size: PatchSize) -> Tensor:
        name = patch_size.name
        scale = at_least(self.scale[name], x.dtype) if name in self.scale else None
        shift = at_least(self.shift[name], x.dtype) if name in self.shift else None
        return F.layer_norm(x, (self.hidden_size,), scale, shift, self.eps)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class Attention(nn.Module):
    """Multi-head self-attention of the tokens of a block, all of a sequence unless the layout says otherwise."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        head_size = hidden_size // num_heads
        self.q_norm = nn.LayerNorm(head_size, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_size, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, *, layout: TokenLayout, masks: Masks) -> Tensor:
        qkv = split_tokens(joint_linear(self.qkv, x, layout), layout)  # (N, T, 3 * D) each
        attended = in_rows(self._attend, [qkv], layout, masks)  # (N, T, D) each
        return joint_linear(self.proj, join_tokens(attended), layout)

    def _attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """(rows, L, 3 * D) -> (rows, L, D)."""
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (rows, heads, L, D / heads) each
        q, k = self.q_norm(q), self.k_norm(k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Mlp(PlainMlp):
    """timm's two-layer perceptron with tanh GELU, its linear layers adapted per patch size: same shape in and out."""

    def __init__(self, hidden_size: int, mlp_width: int) -> None:
        gelu: Any = partial(nn.GELU, approximate="tanh")
        super().__init__(hidden_size, mlp_width, act_layer=gelu)

    def forward(self, x: Tensor, *, layout: TokenLayout) -> Tensor:  # type: ignore[override]
        return joint_linear(self.fc2, self.act(joint_linear(self.fc1, x, layout)), layout)


class GatedMlp(GluMlp):
    """timm's perceptron gated by a SiLU ("SwiGLU", Shazeer 2020), likewise; ``fc1`` makes gate and value at once."""

    def __init__(self, hidden_size: int, mlp_width: int) -> None:
        silu: Any = nn.SiLU
        super().__init__(hidden_size, 2 * mlp_width, act_layer=silu, gate_last=False)

    def forward(self, x: Tensor, *, layout: TokenLayout) -> Tensor:  # type: ignore[override]
        gate, value = joint_linear(self.fc1, x, layout).chunk(2, dim=-1)  # (N, T, mlp_width) each, or joined
        return joint_linear(self.fc2, self.act(gate) * value, layout)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep, then a two-layer perceptron: (N,) -> (N, D).

    ``frequency_shift`` is 0 in DiT's own code and 1 in diffusers' port of it: the k-th of 128 frequencies is
    10000 ** (-k / (128 - frequency_shift)).
    """

    def __init__(self, hidden_size: int, *, frequency_shift: int = 0, num_features: int = 256) -> None:
        super().__init__()
        self.num_features, self.frequency_shift = num_features, frequency_shift
        self.mlp = nn.Sequential(nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(cast(nn.Linear, self.mlp[0]).weight.dtype))

    def features(self, t: Tensor) -> Tensor:
        """(N,) -> (N, 256)."""
        return timestep_features(t, self.num_features, self.frequency_shift)


def timestep_features(t: Tensor, num_features: int = 256, frequency_shift: int = 0) -> Tensor:
    """Cosines, then sines, in float32: (N,) -> (N, num_features); see :class:`TimestepEmbedder`."""
    half = num_features // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    # In this order of operations, as DiT: at t = 999 one rounding more moves the phase by 1e-5.
    frequencies = torch.exp(-math.log(10000.0) * index / (half - frequency_shift))
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LabelEmbedder(nn.Module):
    """Class labels to vectors, the last row being the null label of guidance: (N,) -> (N, D)."""

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(class_dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    """Self-attention and MLP, both modulated by the conditioning vectors (adaLN-Zero).

    (N, T, D), (N, D) -> (N, T, D) for one segment; joined, (S, D), (M, D) -> (S, D) for several.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_width: int, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = SizeNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = SizeNorm(hidden_size, mlp_norm_eps)
        self.mlp = Mlp(hidden_size, mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, *, layout: TokenLayout, masks: Masks) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulated_norm(self.norm1, x, shift_msa, scale_msa, layout)
        x = x + gated(gate_msa, self.attn(h, layout=layout, masks=masks), layout)
        h = modulated_norm(self.norm2, x, shift_mlp, scale_mlp, layout)
        return x + gated(gate_mlp, self.mlp(h, layout=layout), layout)


def modulated_norm(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, layout: TokenLayout) -> Tensor:
    """Each segment with its size's norm and its sequences' vectors: (N, T, D) or (S, D), (M, D), (M, D) -> same."""
    own = zip(layout.segments, *(split_vectors(vectors, layout) for vectors in (shift, scale)), strict=True)
    parts = zip(split_tokens(x, layout), own, strict=True)
    return join_tokens(modulate(norm(part, patch_size=s.patch_size), *vectors) for part, (s, *vectors) in parts)


def gated(gate: Tensor, x: Tensor, layout: TokenLayout) -> Tensor:
    """The tokens times a vector of their sequence: (M, D), (N, T, D) or (S, D) -> same."""
    parts = zip(split_vectors(gate, layout), split_tokens(x, layout), strict=True)
    return join_tokens(own.unsqueeze(1) * part for own, part in parts)


class FinalLayer(nn.Module):
    """Modulated norm, then tokens to patches: (N, T, D), (N, D) -> (N, T, P * O)."""

    def __init__(self, hidden_size: int, out_channels: int, patch_size: PatchSize) -> None:
        super().__init__()
        self.norm_final = SizeNorm(hidden_size)
        self.linear = PatchUnembed(hidden_size, out_channels, patch_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, *, patch_size: PatchSize) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = modulate(self.norm_final(x, patch_size=patch_size), shift, scale)
        return self.linear(x, patch_size=patch_size)
