"""What the model families share: patch sizes, tokens, blocks over one or several batches.

Shape legend: N batch, C channels, F H W latent frames, height and width (images have no F axis), T tokens, D hidden
size, P positions under one patch, O output channels (2 C with a learned variance, else C), f h w patches along time,
height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexidit.config import Positions, TransformerConfig
from flexidit.layers import attention_masks, join_tokens, split_tokens
from flexidit.patch_embed import PatchEmbed, PatchUnembed, unpatchify
from flexidit.patch_size import PatchSize, PatchSizeLike
from flexidit.positions import patch_centres
from flexidit.token_layout import Packing, Segment, TokenLayout, split_attention


class FlexiTransformer(nn.Module, ABC):
    """Predicts the noise (and the variance) in latents: (N, C, [F,] H, W), (N,), N conditions -> (N, O, [F,] H, W).

    ``patch_size`` is a keyword without default at every call: which prediction is cheap and which is good is the
    caller's decision, and a forgotten argument must not quietly choose. No condition is dropped in here either: which
    ones are is the training step's decision, that a teacher and its student share it.

    A family adds its embedders and says, in :meth:`embed_condition`, :meth:`block_arguments` and :meth:`project`, how
    time and condition reach the tokens.
    """

    can_pack = True  # takes several batches in one call; see forward
    adapted_layers: Sequence[str] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    """Linear layers of a block that adapters are attached to: self-attention and feed-forward. Cross-attention stays as
    it is (paper, Fig. 5 and appendix C.2)."""
    config: TransformerConfig
    blocks: nn.ModuleList
    size_embedder: nn.ParameterDict
    """One vector per patch size that ``flexify`` gave one."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False

    @property
    @abstractmethod
    def embedding(self) -> PatchEmbed:
        """Patches to tokens."""

    @property
    @abstractmethod
    def unembedding(self) -> PatchUnembed:
        """Tokens to patches."""

    @property
    def base_patch_size(self) -> PatchSize:
        """The pre-trained, most powerful size."""
        return self.config.patch_size

    @property
    def patch_sizes(self) -> tuple[PatchSize, ...]:
        """All sizes that a call accepts, base first."""
        return self.config.patch_sizes

    @property
    def in_channels(self) -> int:
        """C."""
        return self.config.in_channels

    @property
    def out_channels(self) -> int:
        """O."""
        return self.config.out_channels

    @property
    def learn_sigma(self) -> bool:
        """Whether the last C output channels are a variance."""
        return self.config.learn_sigma

    @property
    def input_size(self) -> tuple[int, ...]:
        """Latent size that positions are held for; others are computed at each call."""
        return self.config.input_size

    @abstractmethod
    def embed_condition(self, t: Tensor, y: Any, size: Sequence[int]) -> Any:
        """Time and condition of one batch as the family's blocks take them: (N,), N conditions."""

    @abstractmethod
    def block_arguments(self, conditions: Sequence[Any], layout: TokenLayout) -> Iterable[tuple[Any, ...]]:
        """For each block, what it takes beside the tokens, for all segments of the layout."""

    @abstractmethod
    def project(self, tokens: Tensor, condition: Any, patch_size: PatchSize) -> Tensor:
        """Tokens to patches: (N, T, D) -> (N, T, P * O)."""

    @abstractmethod
    def null_condition(self, y: Any) -> Any:
        """The condition of the unconditional prediction, as many as ``y``."""

    def prepare(self, y: Any) -> Any:
        """What no step and no patch size changes about conditions, computed once for a sampling run."""
        return y

    def forward(self, x, t, y, *, patch_size, packing=split_attention):  # type: ignore[no-untyped-def]
        """One batch at one patch size; or several, in lists of equal length, in one pass through the blocks.

        Args:
            x: (N, C, H, W), of clips (N, C, F, H, W).
            t: (N,).
            y: N conditions: (N,) labels, or captions.
            patch_size: one of ``patch_sizes``.
            packing: of several batches, which tokens are padded and which attend in one call. The predictions are
                those of separate calls, whatever it is.

        Raises:
            ValueError: a patch size that the model was not made for.
        """
        if isinstance(x, Tensor):
            return self._predict([x], [t], [y], [patch_size], split_attention)[0]
        return self._predict(x, t, y, patch_size, packing)

    def tokenize(self, x: Tensor, patch_size: PatchSize) -> Tensor:
        """Embedded patches, with the vector of their size: (N, C, [F,] H, W) -> (N, T, D)."""
        tokens = self.embedding(x, patch_size=patch_size)
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

    def plain_tables(self, patch_size: PatchSize) -> dict[str, Tensor]:
        """The tables of positions that one patch size has as a plain model, by their names in its state dict."""
        return {}

    def thaw(self) -> None:
        """Train everything that is not computed."""
        self.requires_grad_(True)

    def reset_derived(self) -> None:
        """Recompute what is derived from the config and never saved: resize matrices, positions of weak patches."""
        for layer in (self.embedding, self.unembedding):
            layer.reset_derived()

    def coordinates(self, patch_size: PatchSize, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the patches along time, height and width, in units of the base grid: (f,), (h,), (w,) float64."""
        device = next(self.parameters()).device
        return patch_centres(size, patch_size, self._unit, positions=self._placement, device=device)

    @property
    def _placement(self) -> Positions:
        return self.config.flex.positions if self.config.flex else self.config.placement

    @property
    def _unit(self) -> PatchSize:
        return self.config.position_unit or self.base_patch_size

    def _predict(
        self,
        x: Sequence[Tensor],
        t: Sequence[Tensor],
        y: Sequence[Any],
        patch_sizes: Sequence[PatchSizeLike],
        packing: Packing,
    ) -> list[Tensor]:
        sizes = [self.check_patch_size(size) for size in patch_sizes]
        each = zip(t, y, x, strict=True)
        conditions = [self.embed_condition(ti, yi, xi.shape[2:]) for ti, yi, xi in each]
        tokens = [self.tokenize(xi, size) for xi, size in zip(x, sizes, strict=True)]  # (N, T, D) each
        tokens = self._run_blocks(tokens, conditions, sizes, packing)
        parts = zip(tokens, conditions, sizes, x, strict=True)
        out = ((self.project(h, condition, size), size, xi.shape[2:]) for h, condition, size, xi in parts)
        return [unpatchify(patches, size, latent_size) for patches, size, latent_size in out]  # (N, O, [F,] H, W) each

    def _run_blocks(
        self, tokens: Sequence[Tensor], conditions: Sequence[Any], sizes: Sequence[PatchSize], packing: Packing
    ) -> list[Tensor]:
        """Pad as the packing wants it, run, drop the padding: (N, T, D) each -> (N, T, D) each."""
        layout = packing([Segment(size, *h.shape[:2]) for size, h in zip(sizes, tokens, strict=True)])
        masks = attention_masks(layout, tokens[0].device)
        x = join_tokens(pad(h, s.num_sequences, s.num_tokens) for h, s in zip(tokens, layout.segments, strict=True))
        for block, arguments in zip(self.blocks, self.block_arguments(conditions, layout), strict=True):
            x = self._run(block, x, *arguments, layout=layout, masks=masks)  # (N, T, D), or joined
        parts = zip(split_tokens(x, layout), tokens, strict=True)
        return [part[: h.shape[0], : h.shape[1]] for part, h in parts]

    def _run(self, block: nn.Module, *arguments: Any, **keywords: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, **keywords, use_reentrant=False)
        return block(*arguments, **keywords)


def pad(x: Tensor, *lengths: int) -> Tensor:
    """``x`` with zeros at the end of its first axes, up to these lengths."""
    missing = [length - given for length, given in zip(lengths, x.shape, strict=False)]
    if not any(missing):
        return x
    axes_to_last = [0] * (x.dim() - len(lengths)) + missing[::-1]
    return F.pad(x, [n for extra in axes_to_last for n in (0, extra)])
