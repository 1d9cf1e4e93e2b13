"""Class-conditional diffusion transformer (Peebles and Xie 2023), at one or several patch sizes.

Module names are those of the official checkpoints (facebookresearch/DiT), which load strictly; SiT's are the same.

Shape legend: N batch, H W latent height and width, T tokens, D hidden size, P positions under one patch, O output
channels, M sequences of all segments of a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from flexidit.config import DiTConfig
from flexidit.layers import DiTBlock, FinalLayer, LabelEmbedder, TimestepEmbedder, join_vectors
from flexidit.models.positioned import PositionedTransformer
from flexidit.models.transformer import pad
from flexidit.patch_size import PatchSize
from flexidit.token_layout import TokenLayout


class DiT(PositionedTransformer):
    """Predicts the noise (and the variance) in latents: (N, C, H, W), (N,), (N,) -> (N, O, H, W).

    The condition ``y`` is a class label; see :class:`FlexiTransformer` for the call.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.num_classes = config.num_classes
        width = config.hidden_size
        self.t_embedder = TimestepEmbedder(width, frequency_shift=config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, width, config.class_dropout_prob)
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.num_heads, config.mlp_width, config.mlp_norm_eps) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, self.out_channels, config.patch_size)
        self.size_embedder = nn.ParameterDict()
        self.initialize_weights()

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
        self.initialize_positions()

    def embed_condition(self, t: Tensor, y: Tensor, size: Sequence[int]) -> Tensor:
        """(N,), (N,) -> (N, D)."""
        return self.t_embedder(t) + self.y_embedder(y)

    def block_arguments(self, conditions: Sequence[Tensor], layout: TokenLayout) -> Iterable[tuple[Tensor]]:
        """The same vectors (M, D) for each block."""
        vectors = join_vectors(pad(c, s.num_sequences) for c, s in zip(conditions, layout.segments, strict=True))
        return ((vectors,) for _ in self.blocks)

    def project(self, tokens: Tensor, condition: Tensor, patch_size: PatchSize) -> Tensor:
        """(N, T, D), (N, D) -> (N, T, P * O)."""
        return self.final_layer(tokens, condition, patch_size=patch_size)

    def null_condition(self, y: Tensor) -> Tensor:
        """The label of the unconditional prediction, shaped like ``y``: (N,) -> (N,).

        Raises:
            ValueError: the model was trained without label dropout and has none.
        """
        if self.config.class_dropout_prob == 0:
            raise ValueError("this model was made with class_dropout_prob=0 and has no null label; use cfg_scale=1")
        return torch.full_like(y, self.num_classes)
