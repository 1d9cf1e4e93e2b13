"""The parts of Wan 2.1's blocks (Wan Team 2025), with the conventions of :mod:`flexidit.layers`.

As in Wan's own code the residual stream, norms, modulation and rotations are at least float32, whatever the weights
are; linear layers and attention run in the type of the weights, or of autocast.

Shape legend: N sequences of a segment, M of all, T tokens of a sequence, S of all, L caption tokens, E width of the
text encoder, D hidden size, d = D / heads, P positions under one patch, O output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexidit.layers import (
    Masks,
    SizeNorm,
    at_least,
    gated,
    in_rows,
    join_tokens,
    joint_linear,
    modulate,
    modulated_norm,
    split_tokens,
)
from flexidit.patch_embed import PatchUnembed
from flexidit.patch_size import PatchSize
from flexidit.text_layers import CaptionTokens
from flexidit.token_layout import TokenLayout


class Rotation(NamedTuple):
    """By how much the queries and keys of one segment are rotated."""

    cos: Tensor
    """(T, d / 2)."""
    sin: Tensor
    """(T, d / 2)."""

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate pairs of neighbouring channels: (N, T, heads, d) -> same."""
        even, odd = at_least(x, torch.float32).unflatten(3, (-1, 2)).unbind(4)
        cos, sin = self.cos.unsqueeze(1), self.sin.unsqueeze(1)  # (T, 1, d / 2)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=4).flatten(3).to(x.dtype)


def wide_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in the type of its input, not of its weights."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class RmsNorm(nn.RMSNorm):
    """Of queries or keys over all heads at once: (..., D) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least(x, torch.float32)
        return F.rms_norm(wide, self.normalized_shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class AffineNorm(nn.LayerNorm):
    """Layer norm whose weights are widened to its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class _WanAttention(nn.Module):
    """The layers that both kinds of attention have."""

    def __init__(self, hidden_size: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.k = nn.Linear(hidden_size, hidden_size)
        self.v = nn.Linear(hidden_size, hidden_size)
        self.o = nn.Linear(hidden_size, hidden_size)
        self.norm_q = RmsNorm(hidden_size, eps)
        self.norm_k = RmsNorm(hidden_size, eps)

    def _heads(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, heads, d)."""
        return x.unflatten(2, (self.num_heads, -1))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(N, T, heads, d), (N, L, heads, d) twice -> (N, T, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class WanSelfAttention(_WanAttention):
    """Of the tokens of a block, each of which knows its place by a rotation: (N, T, D) or (S, D) -> same."""

    def forward(self, x: Tensor, rotations: Sequence[Rotation], *, layout: TokenLayout, masks: Masks) -> Tensor:
        q, k, v = (split_tokens(joint_linear(layer, x, layout), layout) for layer in (self.q, self.k, self.v))
        each = list(zip(q, k, rotations, strict=True))
        q = [rotate(self._heads(self.norm_q(own))) for own, _, rotate in each]  # (N, T, heads, d) each
        k = [rotate(self._heads(self.norm_k(own))) for _, own, rotate in each]
        attended = in_rows(_attend, [q, k, [self._heads(own) for own in v]], layout, masks)  # (N, T, D) each
        return joint_linear(self.o, join_tokens(attended), layout)


class WanCrossAttention(_WanAttention):
    """Attention of each token to the caption of its sequence, padding included; see ``text_layers.CrossAttention``."""

    def forward(self, x: Tensor, captions: Sequence[CaptionTokens], *, layout: TokenLayout) -> Tensor:
        queries = split_tokens(self.norm_q(self.q(x)), layout)  # (N, T, D) each
        attended = [self._attend(q, own) for q, own in zip(queries, captions, strict=True)]
        return self.o(join_tokens(attended))

    def keys_values(self, hidden: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, 2 * D)."""
        return torch.cat([self.norm_k(self.k(hidden)), self.v(hidden)], dim=2)

    def _attend(self, q: Tensor, captions: CaptionTokens) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        if captions.keys_values is None:
            assert captions.hidden is not None
            keys_values = self.keys_values(captions.hidden)
        else:
            keys_values = captions.keys_values
        k, v = keys_values.to(q.dtype).chunk(2, dim=2)
        return _attend(self._heads(q), self._heads(k), self._heads(v), captions.mask)


class WanBlock(nn.Module):
    """Self-attention, cross-attention to the caption, perceptron; one modulation for all blocks, plus a table of each.

    (N, T, D), (M, 6, D) -> (N, T, D) for one segment; joined, (S, D) -> (S, D) for several.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = SizeNorm(hidden_size, eps)
        self.self_attn = WanSelfAttention(hidden_size, num_heads, eps)
        self.norm3 = AffineNorm(hidden_size, eps)
        self.cross_attn = WanCrossAttention(hidden_size, num_heads, eps)
        self.norm2 = SizeNorm(hidden_size, eps)
        self.ffn = nn.Sequential(
            nn.Linear(hidden_size, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, hidden_size)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, hidden_size) / hidden_size**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotations: Sequence[Rotation],
        captions: Sequence[CaptionTokens],
        *,
        layout: TokenLayout,
        masks: Masks,
    ) -> Tensor:
        dtype = self.cross_attn.q.weight.dtype
        vectors = (self.modulation + modulation).unbind(dim=1)  # (M, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
        h = modulated_norm(self.norm1, x, shift_msa, scale_msa, layout).to(dtype)
        x = x + gated(gate_msa, self.self_attn(h, rotations, layout=layout, masks=masks), layout)
        x = x + self.cross_attn(self.norm3(x).to(dtype), captions, layout=layout)
        h = modulated_norm(self.norm2, x, shift_mlp, scale_mlp, layout).to(dtype)
        return x + gated(gate_mlp, self._perceptron(h, layout), layout)

    def _perceptron(self, x: Tensor, layout: TokenLayout) -> Tensor:
        return joint_linear(self.ffn[2], self.ffn[1](joint_linear(self.ffn[0], x, layout)), layout)


class WanHead(nn.Module):
    """Modulated norm, then tokens to patches: (N, T, D), (N, D) -> (N, T, P * O)."""

    def __init__(self, hidden_size: int, out_channels: int, patch_size: PatchSize, eps: float) -> None:
        super().__init__()
        self.norm = SizeNorm(hidden_size, eps)
        self.head = PatchUnembed(hidden_size, out_channels, patch_size)
        self.modulation = nn.Parameter(torch.randn(1, 2, hidden_size) / hidden_size**0.5)

    def forward(self, x: Tensor, time: Tensor, *, patch_size: PatchSize) -> Tensor:
        shift, scale = (self.modulation + time.unsqueeze(1)).unbind(dim=1)  # (N, D) each
        x = modulate(self.norm(x, patch_size=patch_size), shift, scale)
        return self.head(x.to(self.head.weight.dtype), patch_size=patch_size)


class TimeEmbedding(nn.Sequential):
    """Features of the time to the model's width, at least in float32: (N, 256) -> (N, D)."""

    def __init__(self, hidden_size: int, num_features: int = 256) -> None:
        super().__init__(nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        first, act, second = self
        wide = at_least(features, cast(nn.Linear, first).weight.dtype)
        return wide_linear(cast(nn.Linear, second), act(wide_linear(cast(nn.Linear, first), wide)))
