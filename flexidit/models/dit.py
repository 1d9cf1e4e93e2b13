"""Class-conditional diffusion transformer (Peebles and Xie 2023), at one or several patch sizes.

Module names are those of the official checkpoints (facebookresearch/DiT), which load strictly; SiT's are the same.

Shape legend: N batch, C channels, H W latent height and width, T tokens, D hidden size, P positions under one patch,
O output channels (2 C with a learned variance, else C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexidit.config import DiTConfig
from flexidit.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    Masks,
    TimestepEmbedder,
    attention_masks,
    join_tokens,
    join_vectors,
    split_tokens,
)
from flexidit.patch_embed import PatchEmbed, unpatchify
from flexidit.patch_size import PatchSize, PatchSizeLike
from flexidit.positions import patch_centres, sincos_2d
from flexidit.token_layout import Packing, Segment, TokenLayout, split_attention


class DiT(nn.Module):
    """Predicts the noise (and the variance) in latents: (N, C, H, W), (N,), (N,) -> (N, O, H, W).

    ``patch_size`` is a keyword without default at every call: which prediction is cheap and which is good is the
    caller's decision, and a forgotten argument must not quietly choose.
    """

    can_pack = True  # takes several batches in one call; see forward

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        self.learn_sigma = config.learn_sigma
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.num_classes = config.num_classes
        self.input_size = config.input_size
        self.gradient_checkpointing = False

        width = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, width, config.patch_size)
        self.t_embedder = TimestepEmbedder(width, frequency_shift=config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, width, config.class_dropout_prob)
        num_tokens = config.patch_size.num_tokens(config.input_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.num_heads, config.mlp_ratio, config.mlp_norm_eps) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, self.out_channels, config.patch_size)
        self.size_embedder = nn.ParameterDict()  # one vector per patch size that flexify gave one
        self.initialize_weights()

    @property
    def base_patch_size(self) -> PatchSize:
        """The pre-trained, most powerful size."""
        return self.config.patch_size

    @property
    def patch_sizes(self) -> tuple[PatchSize, ...]:
        """All sizes that a call accepts, base first."""
        weak = self.config.flex.weak_patch_sizes if self.config.flex else ()
        return (self.base_patch_size, *weak)

    def initialize_weights(self) -> None:
        """DiT's initialisation: Xavier for linear maps; zero gates and output, so that training starts from zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as a linear map, not as a convolution
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for i in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[i]).weight, std=0.02)
        for gated in (*self.blocks, self.final_layer):  # adaLN-Zero: every block starts as the identity
            nn.init.zeros_(gated.adaLN_modulation[1].weight)
            nn.init.zeros_(gated.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        with torch.no_grad():
            self.pos_embed.copy_(self._sincos(self.base_patch_size, self.input_size))

    def reset_derived(self) -> None:
        """Recompute what is derived from the config and never saved: resize matrices, positions of weak patches."""
        for layer in (self.x_embedder, self.final_layer.linear):
            layer.reset_derived()
        for size in self.patch_sizes[1:]:
            table = self._sincos(size, self.input_size)
            self.register_buffer(f"pos_embed_{size.name}", table, persistent=False)

    @overload
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, patch_size: PatchSizeLike, drop_ids: Tensor | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Sequence[Tensor],
        t: Sequence[Tensor],
        y: Sequence[Tensor],
        *,
        patch_size: Sequence[PatchSizeLike],
        packing: Packing = split_attention,
    ) -> list[Tensor]: ...

    def forward(self, x, t, y, *, patch_size, drop_ids=None, packing=split_attention):  # type: ignore[no-untyped-def]
        """One batch at one patch size; or several, in lists of equal length, in one pass through the blocks.

        Args:
            x: (N, C, H, W).
            t: (N,).
            y: (N,).
            patch_size: one of ``patch_sizes``.
            drop_ids: (N,) bool, labels to replace by the null label; None draws them while training.
            packing: of several batches, which tokens are padded and which attend in one call. The predictions are
                those of separate calls, whatever it is.

        Raises:
            ValueError: a patch size that the model was not made for.
        """
        if isinstance(x, Tensor):
            return self._predict([x], [t], [y], [patch_size], drop_ids, split_attention)[0]
        return self._predict(x, t, y, patch_size, drop_ids, packing)

    def tokenize(self, x: Tensor, patch_size: PatchSize) -> Tensor:
        """Embedded patches with position and size: (N, C, H, W) -> (N, T, D)."""
        tokens = self.x_embedder(x, patch_size=patch_size) + self._positions(patch_size, x.shape[2:])
        if patch_size.name in self.size_embedder:
            tokens = tokens + self.size_embedder[patch_size.name]
        return tokens

    def check_patch_size(self, patch_size: PatchSizeLike) -> PatchSize:
        """The parsed size, if this model has it."""
        parsed = PatchSize.parse(patch_size)
        if parsed not in self.patch_sizes:
            known = ", ".join(size.name for size in self.patch_sizes)
            raise ValueError(f"this model has no patch size {parsed.name}, only {known}; flexify() adds sizes")
        return parsed

    def null_condition(self, y: Tensor) -> Tensor:
        """The label of the unconditional prediction, shaped like ``y``: (N,) -> (N,).

        Raises:
            ValueError: the model was trained without label dropout and has none.
        """
        if self.config.class_dropout_prob == 0:
            raise ValueError("this model was made with class_dropout_prob=0 and has no null label; use cfg_scale=1")
        return torch.full_like(y, self.num_classes)

    def _predict(
        self,
        x: Sequence[Tensor],
        t: Sequence[Tensor],
        y: Sequence[Tensor],
        patch_sizes: Sequence[PatchSizeLike],
        drop_ids: Tensor | None,
        packing: Packing,
    ) -> list[Tensor]:
        sizes = [self.check_patch_size(size) for size in patch_sizes]
        c = [self.t_embedder(ti) + self.y_embedder(yi, drop_ids) for ti, yi in zip(t, y, strict=True)]  # (N, D) each
        tokens = [self.tokenize(xi, size) for xi, size in zip(x, sizes, strict=True)]  # (N, T, D) each
        tokens = self._run_blocks(tokens, c, sizes, packing)
        each = zip(tokens, c, sizes, x, strict=True)
        out = ((self.final_layer(h, ci, patch_size=size), size, xi.shape[2:]) for h, ci, size, xi in each)
        return [unpatchify(patches, size, latent_size) for patches, size, latent_size in out]  # (N, O, H, W) each

    def _run_blocks(
        self, tokens: Sequence[Tensor], c: Sequence[Tensor], sizes: Sequence[PatchSize], packing: Packing
    ) -> list[Tensor]:
        """Pad as the packing wants it, run, drop the padding: (N, T, D) each, (N, D) each -> (N, T, D) each."""
        layout = packing([Segment(size, *h.shape[:2]) for size, h in zip(sizes, tokens, strict=True)])
        masks = attention_masks(layout, tokens[0].device)
        x = join_tokens(_pad(h, s.num_sequences, s.num_tokens) for h, s in zip(tokens, layout.segments, strict=True))
        vectors = join_vectors(_pad(ci, s.num_sequences) for ci, s in zip(c, layout.segments, strict=True))  # (M, D)
        for block in self.blocks:
            x = self._run(block, x, vectors, layout, masks)  # (N, T, D), or joined
        parts = zip(split_tokens(x, layout), tokens, strict=True)
        return [part[: h.shape[0], : h.shape[1]] for part, h in parts]

    def _run(self, block: nn.Module, x: Tensor, c: Tensor, layout: TokenLayout, masks: Masks) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, c, layout=layout, masks=masks, use_reentrant=False)
        return block(x, c, layout=layout, masks=masks)

    def _positions(self, patch_size: PatchSize, size: Sequence[int]) -> Tensor:
        """(1, T, D); computed here only for a latent size other than the configured one."""
        if tuple(size) != self.input_size:
            return self._sincos(patch_size, size).to(self.pos_embed.dtype)
        if patch_size == self.base_patch_size:
            return self.pos_embed
        return getattr(self, f"pos_embed_{patch_size.name}")

    def _sincos(self, patch_size: PatchSize, size: Sequence[int]) -> Tensor:
        positions = self.config.flex.positions if self.config.flex else "coords"
        device = self.pos_embed.device
        _, rows, columns = patch_centres(size, patch_size, self.base_patch_size, positions=positions, device=device)
        return sincos_2d(rows, columns, self.config.hidden_size).to(self.pos_embed.dtype).unsqueeze(0)


def _pad(x: Tensor, *lengths: int) -> Tensor:
    """``x`` with zeros at the end of its first axes, up to these lengths."""
    missing = [length - given for length, given in zip(lengths, x.shape, strict=False)]
    if not any(missing):
        return x
    axes_to_last = [0] * (x.dim() - len(lengths)) + missing[::-1]
    return F.pad(x, [n for extra in axes_to_last for n in (0, extra)])
