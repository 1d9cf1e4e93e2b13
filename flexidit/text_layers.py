"""The parts of a text-conditional transformer block, with the conventions of :mod:`flexidit.layers`.

Shape legend: N sequences of a segment, M of all, T tokens of a sequence, S of all, L caption tokens, E width of the
text encoder, D hidden size, P positions under one patch, O output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp as PlainMlp
from torch import Tensor, nn

from flexidit.config import MlpKind
from flexidit.layers import (
    Attention,
    GatedMlp,
    Masks,
    Mlp,
    SizeNorm,
    TimestepEmbedder,
    gated,
    join_tokens,
    modulate,
    modulated_norm,
    split_tokens,
)
from flexidit.patch_embed import PatchUnembed
from flexidit.patch_size import PatchSize
from flexidit.token_layout import TokenLayout


class CaptionTokens(NamedTuple):
    """Captions of one segment as cross-attention takes them: one of the first two is there."""

    hidden: Tensor | None
    """(N, L, D), of which each block computes its keys and values."""
    keys_values: Tensor | None
    """(N, L, 2 * D), computed before."""
    mask: Tensor | None
    """(N, 1, 1, L) bool, True where there is a token; None: all are attended to."""


class CaptionState(NamedTuple):
    """What the captions of one batch have become, for all blocks."""

    hidden: Tensor | None
    """(N, L, D) projected captions; None if each block's keys and values are there."""
    keys_values: tuple[Tensor, ...]
    """(N, L, 2 * D) for each block, or empty."""
    mask: Tensor | None
    """(N, L) bool, or None."""

    def tokens(self, block: int, num_sequences: int) -> CaptionTokens:
        """For one block; sequences that packing has added see a copy of the last caption."""
        values = self.keys_values[block] if self.keys_values else self.hidden
        assert values is not None
        mask = None if self.mask is None else self.mask[:, None, None]
        if num_sequences != len(values):
            rows = torch.arange(num_sequences, device=values.device).clamp(max=len(values) - 1)
            values, mask = values[rows], None if mask is None else mask[rows]
        return CaptionTokens(None, values, mask) if self.keys_values else CaptionTokens(values, None, mask)


class CaptionEmbedder(nn.Module):
    """Embedded captions to the model's width: (N, L, E) -> (N, L, D).

    ``y_embedding`` (L, E) is the null caption of guidance, if the weights have one: PixArt draws it once and never
    trains it.
    """

    y_embedding: Tensor | None

    def __init__(self, caption_channels: int, hidden_size: int, null_length: int) -> None:
        super().__init__()
        gelu: Any = partial(nn.GELU, approximate="tanh")
        self.y_proj = PlainMlp(caption_channels, hidden_size, hidden_size, act_layer=gelu)
        null = torch.randn(null_length, caption_channels) / caption_channels**0.5 if null_length else None
        self.register_buffer("y_embedding", null)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Args: ``mask``: (N, L) bool; what it hides is not even read, be it NaN."""
        visible = torch.where(mask.unsqueeze(2), embeddings, 0)
        return self.y_proj(visible.to(self.y_proj.fc1.weight.dtype))


class SizeEmbedder(TimestepEmbedder):
    """Numbers such as a height in pixels, each embedded like a timestep: (N, K) -> (N, K * D)."""

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(t.flatten()).view(len(t), -1)


class CrossAttention(nn.Module):
    """Attention of each token to the caption of its sequence.

    The same at every patch size, and never adapted: the paper found that to work best (Fig. 5).
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, captions: Sequence[CaptionTokens], *, layout: TokenLayout) -> Tensor:
        queries = split_tokens(self.q_linear(x), layout)  # (N, T, D) each
        attended = [self._attend(q, own) for q, own in zip(queries, captions, strict=True)]
        return self.proj(join_tokens(attended))

    def _attend(self, q: Tensor, captions: CaptionTokens) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        keys_values = self.kv_linear(captions.hidden) if captions.keys_values is None else captions.keys_values
        k, v = keys_values.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, L, D / heads)
        q = q.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T, D / heads)
        x = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=captions.mask)
        return x.transpose(1, 2).flatten(2)


class TextDiTBlock(nn.Module):
    """Self-attention, cross-attention to the caption, MLP; one modulation for all blocks, shifted by a table of each.

    (N, T, D), (N, 6 * D) -> (N, T, D) for one segment; joined, (S, D), (M, 6 * D) -> (S, D) for several. PixArt's
    adaLN-single: the table (6, D) is what a block has of its own.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_width: int, *, mlp: MlpKind = "gelu", qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = SizeNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = SizeNorm(hidden_size)
        self.mlp = GatedMlp(hidden_size, mlp_width) if mlp == "swiglu" else Mlp(hidden_size, mlp_width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(
        self, x: Tensor, modulation: Tensor, captions: Sequence[CaptionTokens], *, layout: TokenLayout, masks: Masks
    ) -> Tensor:
        vectors = (self.scale_shift_table + modulation.unflatten(1, (6, -1))).unbind(dim=1)  # (M, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
        h = modulated_norm(self.norm1, x, shift_msa, scale_msa, layout)
        x = x + gated(gate_msa, self.attn(h, layout=layout, masks=masks), layout)
        x = x + self.cross_attn(x, captions, layout=layout)
        h = modulated_norm(self.norm2, x, shift_mlp, scale_mlp, layout)
        return x + gated(gate_mlp, self.mlp(h, layout=layout), layout)


class TextFinalLayer(nn.Module):
    """Modulated norm, then tokens to patches: (N, T, D), (N, D) -> (N, T, P * O)."""

    def __init__(self, hidden_size: int, out_channels: int, patch_size: PatchSize) -> None:
        super().__init__()
        self.norm_final = SizeNorm(hidden_size)
        self.linear = PatchUnembed(hidden_size, out_channels, patch_size)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x: Tensor, c: Tensor, *, patch_size: PatchSize) -> Tensor:
        shift, scale = (self.scale_shift_table + c.unsqueeze(1)).unbind(dim=1)  # (N, D) each
        x = modulate(self.norm_final(x, patch_size=patch_size), shift, scale)
        return self.linear(x, patch_size=patch_size)
