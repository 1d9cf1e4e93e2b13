"""The parts of a transformer block, each told the patch size of the call.

The size is an explicit argument down to here because activation checkpointing runs a block again during backward:
a switch set from outside would by then belong to another call, and the gradients would be wrong without an error.

Shape legend: N batch, T tokens, D hidden size, R adapter rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp as PlainMlp
from torch import Tensor, nn

from flexidit.patch_embed import PatchUnembed
from flexidit.patch_size import PatchSize


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Per-sample affine map of the tokens: (N, T, D), (N, D), (N, D) -> (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def adapted_linear(layer: nn.Module, x: Tensor, patch_size: PatchSize) -> Tensor:
    """A linear layer, plus the low-rank adapter of ``patch_size`` where ``lora.py`` has attached one.

    Reads the parameters that peft holds, and none of its state: the active adapter is an argument here, so nothing
    needs switching back, and a size without adapter runs the pre-trained layer bit for bit.
    """
    adapters = getattr(layer, "lora_A", None)
    if adapters is None:
        return layer(x)
    out = layer.base_layer(x)
    name = patch_size.name
    if name not in adapters:
        return out
    down, up = adapters[name], layer.lora_B[name]
    delta = up(down(layer.lora_dropout[name](x.to(down.weight.dtype))))  # (N, T, R) -> (N, T, D)
    return out + (delta * layer.scaling[name]).to(out.dtype)


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
        scale = self.scale[name] if name in self.scale else None
        shift = self.shift[name] if name in self.shift else None
        return F.layer_norm(x, (self.hidden_size,), scale, shift, self.eps)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (N, T, D) -> (N, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, *, patch_size: PatchSize) -> Tensor:
        qkv = adapted_linear(self.qkv, x, patch_size)  # (N, T, 3 * D)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, D / heads) each
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (N, T, D)
        return adapted_linear(self.proj, x, patch_size)


class Mlp(PlainMlp):
    """timm's two-layer perceptron with tanh GELU, its linear layers adapted per patch size: (N, T, D) -> (N, T, D)."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))

    def forward(self, x: Tensor, *, patch_size: PatchSize) -> Tensor:
        return adapted_linear(self.fc2, self.act(adapted_linear(self.fc1, x, patch_size)), patch_size)


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
        return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))

    def features(self, t: Tensor) -> Tensor:
        """Cosines, then sines, in float32: (N,) -> (N, 256)."""
        half = self.num_features // 2
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        # In this order of operations, as DiT: at t = 999 one rounding more moves the phase by 1e-5.
        frequencies = torch.exp(-math.log(10000.0) * index / (half - self.frequency_shift))
        angles = t.float().unsqueeze(1) * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class LabelEmbedder(nn.Module):
    """Class labels to vectors, with a null label for guidance: (N,) -> (N, D)."""

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.embedding_table = nn.Embedding(num_classes + int(class_dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor, drop_ids: Tensor | None = None) -> Tensor:
        """Args: ``drop_ids``: (N,) bool, which labels become the null label; None draws them while training."""
        if drop_ids is None and self.training and self.class_dropout_prob > 0:
            drop_ids = torch.rand(y.shape, device=y.device) < self.class_dropout_prob
        if drop_ids is not None:
            y = torch.where(drop_ids, self.num_classes, y)
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    """Self-attention and MLP, both modulated by the conditioning vector (adaLN-Zero): (N, T, D), (N, D) -> (N, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = SizeNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = SizeNorm(hidden_size, mlp_norm_eps)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, *, patch_size: PatchSize) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(self.norm1(x, patch_size=patch_size), shift_msa, scale_msa)
        x = x + gate_msa.unsqueeze(1) * self.attn(h, patch_size=patch_size)
        h = modulate(self.norm2(x, patch_size=patch_size), shift_mlp, scale_mlp)
        return x + gate_mlp.unsqueeze(1) * self.mlp(h, patch_size=patch_size)


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
