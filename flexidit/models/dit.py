"""Class-conditional diffusion transformer (Peebles and Xie 2023), at one or several patch sizes.

Module names are those of the official checkpoints (facebookresearch/DiT), which load strictly; SiT's are the same.

Shape legend: N batch, C channels, H W latent height and width, T tokens, D hidden size, P positions under one patch,
O output channels (2 C with a learned variance, else C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexidit.config import DiTConfig
from flexidit.layers import DiTBlock, FinalLayer, LabelEmbedder, TimestepEmbedder
from flexidit.patch_embed import PatchEmbed, unpatchify
from flexidit.patch_size import PatchSize, PatchSizeLike
from flexidit.positions import patch_centres, sincos_2d


class DiT(nn.Module):
    """Predicts the noise (and the variance) in latents: (N, C, H, W), (N,), (N,) -> (N, O, H, W).

    ``patch_size`` is a keyword without default at every call: which prediction is cheap and which is good is the
    caller's decision, and a forgotten argument must not quietly choose.
    """

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
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
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

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, patch_size: PatchSizeLike, drop_ids: Tensor | None = None
    ) -> Tensor:
        """Args: ``drop_ids``: (N,) bool, labels to replace by the null label; None draws them while training.

        Raises:
            ValueError: a patch size that the model was not made for.
        """
        patch_size = self.check_patch_size(patch_size)
        size = x.shape[2:]
        c = self.t_embedder(t) + self.y_embedder(y, drop_ids)  # (N, D)
        x = self.tokenize(x, patch_size)  # (N, T, D)
        for block in self.blocks:
            x = self._run(block, x, c, patch_size)  # (N, T, D)
        x = self.final_layer(x, c, patch_size=patch_size)  # (N, T, P * O)
        return unpatchify(x, patch_size, size)  # (N, O, H, W)

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

    def _run(self, block: nn.Module, x: Tensor, c: Tensor, patch_size: PatchSize) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, c, patch_size=patch_size, use_reentrant=False)
        return block(x, c, patch_size=patch_size)

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
