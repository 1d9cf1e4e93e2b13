"""Both ends of the token sequence: latents to tokens and back, at any supported patch size.

One set of *underlying* weights serves every patch size: a fixed matrix projects them to the size of the call (paper,
section 3.1). Where the pre-trained function must stay untouched, a size has weights of its own instead (section 3.2).

Shape legend: N batch, C channels, F H W latent frames, height and width, P = t * h * w positions under one patch,
T tokens, D hidden size, O output channels. Images have no F axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexidit.patch_size import PatchSize, as_volume


def patchify(x: Tensor, patch_size: PatchSize) -> Tensor:
    """Cut latents into patches, row-major, channels last in each: (N, C, [F,] H, W) -> (N, T, P * C).

    The last patch of an axis that the size does not divide is filled by repeating the border.
    """
    x = pad_to_patches(as_clip(x), patch_size)
    n, channels = x.shape[:2]
    f, h, w = patch_size.grid(x.shape[2:])
    x = x.view(n, channels, f, patch_size.t, h, patch_size.h, w, patch_size.w)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(n, f * h * w, patch_size.volume * channels)


def unpatchify(tokens: Tensor, patch_size: PatchSize, size: Sequence[int]) -> Tensor:
    """Exact inverse of :func:`patchify`, padding cropped: (N, T, P * C) -> (N, C, [F,] H, W) of the given ``size``."""
    f, h, w = patch_size.grid(size)
    n, channels = tokens.shape[0], tokens.shape[2] // patch_size.volume
    x = tokens.view(n, f, h, w, patch_size.t, patch_size.h, patch_size.w, channels)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (N, C, f, t, h, ph, w, pw)
    x = x.reshape(n, channels, f * patch_size.t, h * patch_size.h, w * patch_size.w)
    frames, height, width = as_volume(size)
    return x[:, :, :frames, :height, :width].reshape(n, channels, *size)


def as_clip(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 1, H, W); a clip passes unchanged."""
    return x.unsqueeze(2) if x.dim() == 4 else x


def pad_to_patches(x: Tensor, patch_size: PatchSize) -> Tensor:
    """Extend each latent axis of (N, C, F, H, W) to a whole number of patches by repeating its border."""
    sides = patch_size.as_tuple()
    missing = [(-length) % side for length, side in zip(x.shape[2:], sides, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")


def as_3d(weight: Tensor) -> Tensor:
    """A kernel (D, C, h, w) -> (D, C, 1, h, w); a 3-D one passes unchanged."""
    return weight.unsqueeze(2) if weight.dim() == 4 else weight


def resize_matrix_1d(old: int, new: int) -> Tensor:
    """Matrix (new, old), float64 on CPU, that resizes a line of ``old`` samples to ``new`` ones.

    Bilinear interpolation, except that a shrink by a whole factor averages each cell. For a factor of two both are
    the same; for larger ones bilinear reads two samples per cell and would be blind to the others. Along time the
    average, its transpose and its pseudo-inverse are the duplication of appendix C.2.
    """
    if old % new == 0:
        return torch.eye(new, dtype=torch.float64, device="cpu").repeat_interleave(old // new, dim=1) * (new / old)
    basis = torch.eye(old, dtype=torch.float64, device="cpu").unsqueeze(1)
    return F.interpolate(basis, new, mode="linear").squeeze(1).T.contiguous()


def resize_matrix(old: PatchSize, new: PatchSize) -> Tensor:
    """Matrix R (P_new, P_old), float64 on CPU: ``R @ patch.flatten()`` is the resized patch.

    Derived data: recomputed, never in a checkpoint.
    """
    t, h, w = (resize_matrix_1d(a, b) for a, b in zip(old.as_tuple(), new.as_tuple(), strict=True))
    return torch.kron(torch.kron(t, h), w)


def embed_projection(underlying: PatchSize, current: PatchSize) -> Tensor:
    """Q_embed of section 3.1, the pseudo-inverse of the transposed resize: (P_current, P_underlying)."""
    return torch.linalg.pinv(resize_matrix(underlying, current).T)


def unembed_projection(underlying: PatchSize, current: PatchSize) -> Tensor:
    """Q_de-embed of section 3.1: the output patch of the underlying size, resized: (P_current, P_underlying)."""
    return resize_matrix(underlying, current)


class _FlexiLayer(nn.Module):
    """What embedding and de-embedding share: which weights serve which patch size.

    A size is served, in this order, by its own layer in ``per_size`` (recipe "lora"), or by the underlying weights,
    projected where the size differs from ``patch_size`` (recipe "shared").
    """

    per_size: nn.ModuleDict

    def __init__(self, patch_size: PatchSize, projection: Callable[[PatchSize, PatchSize], Tensor]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.per_size = nn.ModuleDict()
        self._projection = projection
        self._projected: list[PatchSize] = []

    def _serve(self, patch_sizes: Sequence[PatchSize]) -> None:
        """Hold the projection matrix of each size that differs from the underlying one."""
        self._projected = [size for size in patch_sizes if size != self.patch_size]
        for size in self._projected:
            self.register_buffer(f"projection_{size.name}", None, persistent=False)
        self.reset_derived()

    def reset_derived(self) -> None:
        """Recompute the projection matrices on the weights' device: they are never saved, nor filled by a load."""
        weight = next(self.parameters())
        for size in self._projected:
            matrix = self._projection(self.patch_size, size)
            setattr(self, f"projection_{size.name}", matrix.to(weight.device, torch.float32))

    def _project(self, weight: Tensor, size: PatchSize) -> Tensor:
        """(..., P_underlying) -> (..., P_current)."""
        if size == self.patch_size:
            return weight
        matrix: Tensor = getattr(self, f"projection_{size.name}")
        return weight @ matrix.to(weight.dtype).T

    def extra_repr(self) -> str:
        projected = ", ".join(size.name for size in self._projected)
        return f"patch_size={self.patch_size.name}" + (f", projected to {projected}" if projected else "")


class PatchEmbed(_FlexiLayer):
    """Latents to tokens: (N, C, [F,] H, W) -> (N, T, D)."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: PatchSize, *, num_axes: int = 2) -> None:
        super().__init__(patch_size, embed_projection)
        self.num_axes = num_axes
        self.proj = self._kernel(in_channels, hidden_size, patch_size)

    def _kernel(self, in_channels: int, hidden_size: int, patch_size: PatchSize) -> nn.Conv2d | nn.Conv3d:
        sides = patch_size.as_tuple()
        if self.num_axes == 3:
            return nn.Conv3d(in_channels, hidden_size, sides, stride=sides)
        return nn.Conv2d(in_channels, hidden_size, sides[1:], stride=sides[1:])

    def forward(self, x: Tensor, *, patch_size: PatchSize) -> Tensor:
        weight, bias = self.weights(patch_size)
        x = x.to(weight.dtype)  # the diffusion around it may be more precise
        if self.num_axes == 3:  # two to seven times faster than a 3-D convolution on CPU
            return F.linear(patchify(x, patch_size), weight.permute(0, 2, 3, 4, 1).flatten(1), bias)
        x = pad_to_patches(as_clip(x), patch_size).squeeze(2)
        return F.conv2d(x, weight.squeeze(2), bias, patch_size.as_tuple()[1:]).flatten(2).transpose(1, 2)

    def weights(self, patch_size: PatchSize) -> tuple[Tensor, Tensor | None]:
        """Kernel (D, C, t, h, w) and bias (D,) that serve ``patch_size``."""
        if patch_size.name in self.per_size:
            own = cast(nn.Conv2d, self.per_size[patch_size.name])
            return as_3d(own.weight), own.bias
        weight = self._project(as_3d(self.proj.weight).flatten(2), patch_size)
        return weight.unflatten(2, patch_size.as_tuple()), self.proj.bias

    @torch.no_grad()
    def share(self, underlying: PatchSize, patch_sizes: Sequence[PatchSize]) -> None:
        """Move to weights of an underlying size that give back the present ones, exactly, at the present size."""
        old, old_size = self.proj, self.patch_size
        inverse = resize_matrix(underlying, old_size)  # pinv(pinv(R^T)) = R^T
        self.proj = self._kernel(old.in_channels, old.out_channels, underlying).to(old.weight)
        self.proj.weight.copy_(_matmul64(as_3d(old.weight).flatten(2), inverse).view_as(self.proj.weight))
        _copy_bias(self.proj, old)
        self.patch_size = underlying
        self._serve(patch_sizes)

    @torch.no_grad()
    def add_size(self, patch_size: PatchSize) -> None:
        """Give ``patch_size`` weights of its own, initialised as :meth:`share` would."""
        own = self._kernel(self.proj.in_channels, self.proj.out_channels, patch_size).to(self.proj.weight)
        weight = _matmul64(as_3d(self.proj.weight).flatten(2), resize_matrix(patch_size, self.patch_size))
        own.weight.copy_(weight.view_as(own.weight))
        _copy_bias(own, self.proj)
        self.per_size[patch_size.name] = own


class PatchUnembed(_FlexiLayer):
    """Tokens to patches, channels last as :func:`unpatchify` takes them: (N, T, D) -> (N, T, P * O).

    Its own ``weight`` (P * O, D) and ``bias`` (P * O,) are those of DiT's ``final_layer.linear``.
    """

    def __init__(self, hidden_size: int, out_channels: int, patch_size: PatchSize) -> None:
        super().__init__(patch_size, unembed_projection)
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.empty(patch_size.volume * out_channels, hidden_size))
        self.bias = nn.Parameter(torch.zeros(patch_size.volume * out_channels))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, *, patch_size: PatchSize) -> Tensor:
        return F.linear(x, *self.weights(patch_size))

    def weights(self, patch_size: PatchSize) -> tuple[Tensor, Tensor]:
        """Matrix (P * O, D) and bias (P * O,) that serve ``patch_size``."""
        if patch_size.name in self.per_size:
            own = cast(nn.Linear, self.per_size[patch_size.name])
            return own.weight, own.bias
        if patch_size == self.patch_size:
            return self.weight, self.bias
        weight = self._project(self._positions_last(self.weight), patch_size)  # (O, D, P)
        bias = self._project(self._positions_last(self.bias), patch_size)  # (O, P)
        return weight.permute(2, 0, 1).flatten(0, 1), bias.T.flatten()

    def _positions_last(self, values: Tensor) -> Tensor:
        """(P * O, ...) -> (O, ..., P)."""
        return values.unflatten(0, (-1, self.out_channels)).movedim(0, -1)

    def _resized_from(self, old_size: PatchSize, new_size: PatchSize, values: Tensor) -> Tensor:
        """Inverse of the projection to ``old_size``: (P_old * O, ...) -> (P_new * O, ...)."""
        inverse = torch.linalg.pinv(unembed_projection(new_size, old_size))  # (P_new, P_old)
        return _matmul64(self._positions_last(values), inverse.T).movedim(-1, 0).flatten(0, 1)

    @torch.no_grad()
    def share(self, underlying: PatchSize, patch_sizes: Sequence[PatchSize]) -> None:
        """Move to weights of an underlying size that give back the present ones, exactly, at the present size."""
        weight, bias = (self._resized_from(self.patch_size, underlying, v) for v in (self.weight, self.bias))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.patch_size = underlying
        self._serve(patch_sizes)

    @torch.no_grad()
    def add_size(self, patch_size: PatchSize) -> None:
        """Give ``patch_size`` weights of its own, initialised as :meth:`share` would."""
        own = nn.Linear(self.weight.shape[1], patch_size.volume * self.out_channels).to(self.weight)
        own.weight.copy_(self._resized_from(self.patch_size, patch_size, self.weight))
        own.bias.copy_(self._resized_from(self.patch_size, patch_size, self.bias))
        self.per_size[patch_size.name] = own


def _matmul64(weight: Tensor, matrix: Tensor) -> Tensor:
    """``weight @ matrix`` in float64, so that an initialisation and its inverse agree to the last bit or two."""
    return (weight.double() @ matrix.to(weight.device)).to(weight.dtype)


def _copy_bias(target: nn.Conv2d | nn.Conv3d, source: nn.Conv2d | nn.Conv3d) -> None:
    if target.bias is not None and source.bias is not None:
        target.bias.copy_(source.bias)
