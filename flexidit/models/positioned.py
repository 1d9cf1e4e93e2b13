"""Transformers that add a position to each token: sines and cosines, or learned tables.

Of clips the position is the sum of one in space and one in time (Movie Gen's factorised tables; paper, appendix C.2:
"also along the temporal dimension"). The computed code of time is its difference to that of the first frame, and a
learned one starts at zero where an image model is inflated: the first frame sits where an image does.

Shape legend: N batch, C channels, F H W latent frames, height and width, T tokens, D hidden size, f h w patches along
time, height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flexidit.config import TransformerConfig
from flexidit.layers import FinalLayer
from flexidit.models.transformer import FlexiTransformer
from flexidit.patch_embed import PatchEmbed, PatchUnembed
from flexidit.patch_size import PatchSize, as_volume
from flexidit.positions import interpolate_line, interpolate_table, sincos_1d, sincos_2d
from flexidit.text_layers import TextFinalLayer


class PositionedTransformer(FlexiTransformer):
    """A :class:`FlexiTransformer` whose tokens carry their positions from the start."""

    pos_embed: Tensor
    """(1, h * w, D), of the base patch size in space; learned, or computed from the config."""
    pos_embed_time: Tensor
    """(1, f, D), of clips where positions are learned; those that are computed are not kept."""
    x_embedder: PatchEmbed
    final_layer: FinalLayer | TextFinalLayer

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.x_embedder = PatchEmbed(
            config.in_channels, config.hidden_size, config.patch_size, num_axes=len(config.input_size)
        )
        unit = config.patch_size if config.computes_positions else self._unit
        frames, height, width = unit.grid(config.input_size)
        learned, size = not config.computes_positions, config.hidden_size
        self.pos_embed = nn.Parameter(torch.zeros(1, height * width, size), requires_grad=learned)
        if config.is_video and learned:
            self.pos_embed_time = nn.Parameter(torch.zeros(1, frames, size))

    @property
    def embedding(self) -> PatchEmbed:
        return self.x_embedder

    @property
    def unembedding(self) -> PatchUnembed:
        return self.final_layer.linear

    @torch.no_grad()
    def initialize_positions(self) -> None:
        """The computed table, or small random numbers to learn from."""
        if self.config.computes_positions:
            self.pos_embed.copy_(self.computed_positions(self.base_patch_size, self.input_size))
            return
        for name in ("pos_embed", "pos_embed_time"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def tokenize(self, x: Tensor, patch_size: PatchSize) -> Tensor:
        """Embedded patches with position and size: (N, C, [F,] H, W) -> (N, T, D)."""
        return super().tokenize(x, patch_size) + self.positions(patch_size, x.shape[2:])

    def thaw(self) -> None:
        super().thaw()
        self.pos_embed.requires_grad_(not self.config.computes_positions)

    def reset_derived(self) -> None:
        super().reset_derived()
        if self.config.computes_positions:
            for size in self.patch_sizes[1:]:
                table = self.computed_positions(size, self.input_size)
                self.register_buffer(f"pos_embed_{size.name}", table, persistent=False)

    def plain_tables(self, patch_size: PatchSize) -> dict[str, Tensor]:
        if not self.config.computes_positions:
            return {name: getattr(self, name) for name in ("pos_embed", "pos_embed_time") if hasattr(self, name)}
        return {"pos_embed": self._space_positions(patch_size, self.input_size)}

    def positions(self, patch_size: PatchSize, size: Sequence[int]) -> Tensor:
        """Of the tokens of a latent size: (1, T, D)."""
        space = self._space_positions(patch_size, size)  # (1, h * w, D)
        if not self.config.is_video:
            return space
        time = self._time_positions(patch_size, size)  # (1, f, D)
        return (time.unsqueeze(2) + space.unsqueeze(1)).flatten(1, 2)

    def computed_positions(self, patch_size: PatchSize, size: Sequence[int]) -> Tensor:
        """Sines and cosines at the patches' coordinates in space: (1, h * w, D)."""
        _, rows, columns = self.coordinates(patch_size, size)
        return sincos_2d(rows, columns, self.config.hidden_size).to(self.pos_embed.dtype).unsqueeze(0)

    def _space_positions(self, patch_size: PatchSize, size: Sequence[int]) -> Tensor:
        """(1, h * w, D); computed only at another latent size than the configured one, or read off a learned table."""
        is_native = tuple(size[-2:]) == self.input_size[-2:]
        if not self.config.computes_positions:
            return self._read_table(patch_size, size, is_native)
        if is_native and patch_size == self.base_patch_size:
            return self.pos_embed
        if is_native:
            return getattr(self, f"pos_embed_{patch_size.name}")
        return self.computed_positions(patch_size, size)

    def _read_table(self, patch_size: PatchSize, size: Sequence[int], is_native: bool) -> Tensor:
        """From the learned table, which is that of the unit's grid."""
        unit = self._unit
        if is_native and (patch_size.h, patch_size.w) == (unit.h, unit.w):
            return self.pos_embed
        _, rows, columns = self.coordinates(patch_size, size)
        return interpolate_table(self.pos_embed, unit.grid(self.input_size)[1:], rows, columns)

    def _time_positions(self, patch_size: PatchSize, size: Sequence[int]) -> Tensor:
        """(1, f, D)."""
        frames, _, _ = self.coordinates(patch_size, size)
        if self.config.computes_positions:
            code = sincos_1d(frames, self.config.hidden_size) - sincos_1d(frames.new_zeros(1), self.config.hidden_size)
            return code.to(self.pos_embed.dtype).unsqueeze(0)
        if patch_size.t == self._unit.t and as_volume(size)[0] == self.input_size[0]:
            return self.pos_embed_time
        return interpolate_line(self.pos_embed_time, frames)
