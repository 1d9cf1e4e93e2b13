"""Text-conditional diffusion transformer with cross-attention and adaLN-single, at one or several patch sizes.

It is PixArt-alpha (Chen et al. 2023), whose module names it has, the paper's "T2I Transf."; with ``qk_norm`` and
learned positions it is the paper's Emu (appendix C.2); with latents of three axes its Video DiT (section 4.3): tokens
of all frames attend to one another.

Shape legend: N batch, F H W latent frames, height and width (images have no F axis), T tokens, L caption tokens, E
width of the text encoder, D hidden size, P positions under one patch, O output channels, M sequences of all segments
of a pass, f h w patches along time, height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexidit.conditions import CaptionKeys, Captions
from flexidit.config import TextDiTConfig
from flexidit.layers import TimestepEmbedder, join_vectors
from flexidit.models.positioned import PositionedTransformer
from flexidit.models.transformer import pad
from flexidit.patch_size import PatchSize
from flexidit.text_layers import (
    CaptionEmbedder,
    CaptionState,
    CaptionTokens,
    CrossAttention,
    SizeEmbedder,
    TextDiTBlock,
    TextFinalLayer,
)
from flexidit.token_layout import TokenLayout


class _Conditioning(NamedTuple):
    """What time and caption of one batch have become."""

    time: Tensor
    """(N, D)."""
    modulation: Tensor
    """(N, 6 * D), for all blocks."""
    captions: CaptionState


class TextDiT(PositionedTransformer):
    """Predicts the noise (and the variance) in latents: (N, C, [F,] H, W), (N,), N captions -> (N, O, [F,] H, W).

    The condition ``y`` is :class:`Captions`, or :class:`CaptionKeys` from :meth:`prepare`.
    """

    config: TextDiTConfig

    def __init__(self, config: TextDiTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        null_length = config.caption_length if config.null_caption else 0
        self.y_embedder = CaptionEmbedder(config.caption_channels, width, null_length)
        if config.micro_conditions:
            self.csize_embedder, self.ar_embedder = SizeEmbedder(width // 3), SizeEmbedder(width // 3)
        self.blocks = nn.ModuleList(
            TextDiTBlock(width, config.num_heads, config.mlp_width, mlp=config.mlp, qk_norm=config.qk_norm)
            for _ in range(config.depth)
        )
        self.final_layer = TextFinalLayer(width, self.out_channels, config.patch_size)
        self.size_embedder = nn.ParameterDict()
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """PixArt's initialisation: Xavier for linear maps; cross-attention and output start at zero.

        Except that the caption projection is Xavier too: at PixArt's width that is its 0.02, and for a narrow text
        encoder 0.02 would be so small that captions hardly enter.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as a linear map, not as a convolution
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        embedders = [module for module in self.modules() if isinstance(module, TimestepEmbedder)]
        linear = [embedder.mlp[i] for embedder in embedders for i in (0, 2)]
        for layer in (*linear, self.t_block[1]):
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(cast(TextDiTBlock, block).cross_attn.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        self.initialize_positions()

    def coordinates(self, patch_size: PatchSize, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the patches along time, height and width, in units of the base grid: (f,), (h,), (w,) float64.

        In space any latent size spans the extent of the configured one, divided by ``position_scale``, as in PixArt
        (``lewei_scale``) and in diffusers (``interpolation_scale``). Frames are as far apart in clips of any length.
        """
        frames, *axes = super().coordinates(patch_size, size)
        unit = patch_size if self._placement == "grid" else self._unit
        own, configured = unit.grid(size)[1:], unit.grid(self.input_size)[1:]
        each = zip(axes, configured, own, strict=True)
        rows, columns = (axis * (span / (count * self.config.position_scale)) for axis, span, count in each)
        return frames, rows, columns

    def embed_condition(self, t: Tensor, y: Captions | CaptionKeys, size: Sequence[int]) -> _Conditioning:
        """(N,), N captions, latent size."""
        time = self.t_embedder(t)  # (N, D)
        if self.config.micro_conditions:
            time = time + self._embed_image_size(y, size).to(time.dtype)
        if isinstance(y, CaptionKeys):
            return _Conditioning(time, self.t_block(time), CaptionState(None, y.keys_values, y.mask))
        hidden = self.y_embedder(y.embeddings, y.mask)
        return _Conditioning(time, self.t_block(time), CaptionState(hidden, (), y.mask))

    def block_arguments(
        self, conditions: Sequence[_Conditioning], layout: TokenLayout
    ) -> Iterable[tuple[Tensor, list[CaptionTokens]]]:
        """For each block: modulation (M, 6 * D), and the captions of each segment."""
        counts = [segment.num_sequences for segment in layout.segments]
        modulation = join_vectors(pad(c.modulation, count) for c, count in zip(conditions, counts, strict=True))
        for block in range(len(self.blocks)):
            yield modulation, [c.captions.tokens(block, count) for c, count in zip(conditions, counts, strict=True)]

    def project(self, tokens: Tensor, condition: _Conditioning, patch_size: PatchSize) -> Tensor:
        """(N, T, D) -> (N, T, P * O)."""
        return self.final_layer(tokens, condition.time, patch_size=patch_size)

    def null_condition(self, y: Captions) -> Captions:
        """The caption of the unconditional prediction, as many as ``y`` and with their masks, as PixArt trains it.

        Raises:
            ValueError: the weights have none, or captions are longer than it is.
        """
        null = self.y_embedder.y_embedding
        if null is None:
            raise ValueError(
                "these weights have no null caption (diffusers' layout does not hold it): give negative captions, such "
                "as the encoded empty prompt, or use cfg_scale=1"
            )
        if y.num_tokens > len(null):
            raise ValueError(f"captions of {y.num_tokens} tokens are longer than the model's {len(null)}; cut them")
        embeddings = null[: y.num_tokens].to(y.embeddings).expand_as(y.embeddings)
        return Captions(embeddings, y.mask, y.image_size)

    def prepare(self, y: Captions) -> Captions | CaptionKeys:
        """Keys and values of cross-attention, which no step and no patch size changes: once for a sampling run.

        Sharded weights are gathered block by block inside their own forward, so there captions stay as they are.
        """
        first = cast(CrossAttention, self.blocks[0].cross_attn) if len(self.blocks) else None
        if first is None or isinstance(first.kv_linear.weight, DTensor):
            return y
        hidden = self.y_embedder(y.embeddings, y.mask)
        keys_values = tuple(cast(CrossAttention, block.cross_attn).kv_linear(hidden) for block in self.blocks)
        return CaptionKeys(keys_values, y.mask, y.image_size)

    def _embed_image_size(self, y: Captions | CaptionKeys, size: Sequence[int]) -> Tensor:
        """Height, width and their ratio: (N, D)."""
        pixels = y.image_size
        if pixels is None:
            sides = (float(side * self.config.pixels_per_latent) for side in size)  # filled on the device: no copy
            pixels = torch.stack([torch.full((len(y),), side, device=y.mask.device) for side in sides], dim=1)
        ratio = pixels[:, :1] / pixels[:, 1:]
        return torch.cat([self.csize_embedder(pixels), self.ar_embedder(ratio)], dim=1)
