"""Wan 2.1, the public text-to-video transformer (Wan Team 2025), at one or several patch sizes.

Module names are those of the original checkpoints (Wan-Video/Wan2.1), except that the convolution of
``patch_embedding`` is its ``proj``; ``layouts/wan.py`` translates.

Shape legend: N batch, C channels, F H W latent frames, height and width, T tokens, L caption tokens, E width of the
text encoder, D hidden size, d size of a head, P positions under one patch, M sequences of all segments of a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexidit.conditions import CaptionKeys, Captions
from flexidit.config import WanConfig
from flexidit.layers import at_least, join_vectors, timestep_features
from flexidit.models.transformer import FlexiTransformer, pad
from flexidit.patch_embed import PatchEmbed, PatchUnembed
from flexidit.patch_size import PatchSize
from flexidit.positions import rotary_angles
from flexidit.text_layers import CaptionState, CaptionTokens
from flexidit.token_layout import TokenLayout
from flexidit.wan_layers import Rotation, TimeEmbedding, WanBlock, WanHead


class _Conditioning(NamedTuple):
    """What time and caption of one batch have become, and what else its blocks must know."""

    time: Tensor
    """(N, D)."""
    modulation: Tensor
    """(N, 6, D), for all blocks."""
    captions: CaptionState
    size: tuple[int, ...]
    """Of the latents."""


class Wan(FlexiTransformer):
    """Predicts the velocity of latent clips: (N, C, F, H, W), (N,) from 0 to 1000, N captions -> (N, C, F, H, W).

    The condition ``y`` is :class:`Captions`, or :class:`CaptionKeys` from :meth:`prepare`. Hidden tokens become zeros,
    captions are filled up with zeros to the length that Wan was trained with, and all of it is attended to, as Wan
    does: there is no mask.
    """

    adapted_layers = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")
    config: WanConfig

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, config.norm_eps
        self.patch_embedding = PatchEmbed(config.in_channels, width, config.patch_size, num_axes=3)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.caption_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.time_embedding = TimeEmbedding(width)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(
            WanBlock(width, config.num_heads, config.mlp_width, eps) for _ in range(config.depth)
        )
        self.head = WanHead(width, self.out_channels, config.patch_size, eps)
        self.size_embedder = nn.ParameterDict()
        self.initialize_weights()

    @property
    def embedding(self) -> PatchEmbed:
        return self.patch_embedding

    @property
    def unembedding(self) -> PatchUnembed:
        return self.head.head

    def initialize_weights(self) -> None:
        """Wan's initialisation: Xavier for linear maps, and an output of zero.

        Except that the caption projection is Xavier too: at Wan's width that is its 0.02, and for a narrow text
        encoder 0.02 would be so small that captions hardly enter.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.proj.weight.flatten(1))  # as a linear map, not as a convolution
        for i in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.time_embedding[i]).weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        nn.init.zeros_(self.head.head.bias)

    def tokenize(self, x: Tensor, patch_size: PatchSize) -> Tensor:
        """Embedded patches, the start of a residual stream in float32 at least: (N, C, F, H, W) -> (N, T, D)."""
        return at_least(super().tokenize(x, patch_size), torch.float32)

    def rotation(self, patch_size: PatchSize, size: Sequence[int]) -> Rotation:
        """Of the tokens of a latent size: (T, d / 2) twice, computed in float64."""
        angles = rotary_angles(*self.coordinates(patch_size, size), self.config.hidden_size // self.config.num_heads)
        dtype = torch.promote_types(self.head.head.weight.dtype, torch.float32)
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))

    def embed_condition(self, t: Tensor, y: Captions | CaptionKeys, size: Sequence[int]) -> _Conditioning:
        """(N,), N captions, latent size."""
        precise = nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)
        with precise:
            time = self.time_embedding(timestep_features(t))  # (N, D)
            activation, projection = self.time_projection
            modulation = projection(activation(time).to(cast(nn.Linear, projection).weight.dtype)).to(time.dtype)
        if isinstance(y, CaptionKeys):
            captions = CaptionState(None, y.keys_values, None)
        else:
            captions = CaptionState(self._embed_captions(y), (), None)
        return _Conditioning(time, modulation.unflatten(1, (6, -1)), captions, tuple(size))

    def block_arguments(
        self, conditions: Sequence[_Conditioning], layout: TokenLayout
    ) -> Iterable[tuple[Tensor, list[Rotation], list[CaptionTokens]]]:
        """For each block: modulation (M, 6, D), and of each segment rotations and captions."""
        parts = list(zip(conditions, layout.segments, strict=True))
        modulation = join_vectors(pad(c.modulation, s.num_sequences) for c, s in parts)
        rotations = [
            Rotation(*(pad(values, s.num_tokens) for values in self.rotation(s.patch_size, c.size))) for c, s in parts
        ]
        for block in range(len(self.blocks)):
            yield modulation, rotations, [c.captions.tokens(block, s.num_sequences) for c, s in parts]

    def project(self, tokens: Tensor, condition: _Conditioning, patch_size: PatchSize) -> Tensor:
        """(N, T, D) -> (N, T, P * C)."""
        return self.head(tokens, condition.time, patch_size=patch_size)

    def null_condition(self, y: Captions) -> Captions:
        """There is none.

        Raises:
            ValueError: always: Wan is guided by an encoded caption, a negative or the empty one.
        """
        raise ValueError(
            "a Wan has no null caption: give negative captions, such as the encoded empty prompt, or use cfg_scale=1"
        )

    def prepare(self, y: Captions) -> Captions | CaptionKeys:
        """Keys and values of cross-attention, which no step and no patch size changes: once for a sampling run.

        Sharded weights are gathered block by block inside their own forward, so there captions stay as they are.
        """
        blocks = [cast(WanBlock, block) for block in self.blocks]
        if not blocks or isinstance(blocks[0].cross_attn.k.weight, DTensor):
            return y
        hidden = self._embed_captions(y)
        keys_values = tuple(block.cross_attn.keys_values(hidden) for block in blocks)
        return CaptionKeys(keys_values, y.padded(self.config.caption_length).mask, y.image_size)

    def _embed_captions(self, y: Captions) -> Tensor:
        """(N, L, D), of zeros where there is no token.

        Raises:
            ValueError: captions that are longer than Wan's.
        """
        length = self.config.caption_length
        if y.num_tokens > length:
            raise ValueError(f"captions of {y.num_tokens} tokens are longer than the model's {length}; cut them")
        y = y.padded(length)
        visible = torch.where(y.mask.unsqueeze(2), y.embeddings, 0)  # what is hidden is not even read, be it NaN
        return self.text_embedding(visible.to(cast(nn.Linear, self.text_embedding[0]).weight.dtype))
