from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed
from torch import nn

from flexidit.patch_embed import (
    PatchEmbed,
    PatchUnembed,
    embed_projection,
    patchify,
    resize_matrix,
    resize_matrix_1d,
    unembed_projection,
    unpatchify,
)
from flexidit.patch_size import PatchSize

SIZES = [PatchSize.parse(s) for s in (2, 3, 4, 8)]
BASE = PatchSize.parse(2)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 9)])
@pytest.mark.parametrize("patch_size", SIZES)
def test_unpatchify_is_the_inverse_of_patchify(patch_size: PatchSize, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    tokens = patchify(x, patch_size)
    assert tokens.shape == (2, patch_size.num_tokens(size), patch_size.volume * 3)
    assert torch.equal(unpatchify(tokens, patch_size, size), x)


@pytest.mark.parametrize("patch_size", ["1x2x2", "2x2x2", "2x4x4", "3x2x2"])
def test_unpatchify_is_the_inverse_of_patchify_for_clips(patch_size: str) -> None:
    x = torch.randn(2, 3, 5, 6, 9)
    size = PatchSize.parse(patch_size)
    assert torch.equal(unpatchify(patchify(x, size), size, x.shape[2:]), x)


def test_patchify_agrees_with_unfold() -> None:
    x = torch.randn(2, 3, 8, 12)
    unfolded = F.unfold(x, 4, stride=4).transpose(1, 2).unflatten(2, (3, 16)).transpose(2, 3).flatten(2)
    assert torch.equal(patchify(x, PatchSize.parse(4)), unfolded)


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (3, 2), (4, 3), (4, 4)])
def test_resize_is_bilinear_interpolation(old: int, new: int) -> None:
    line = torch.randn(1, 1, old, dtype=torch.float64)
    expected = F.interpolate(line, new, mode="linear").flatten()
    torch.testing.assert_close(resize_matrix_1d(old, new) @ line.flatten(), expected)


def test_a_large_shrink_sees_every_sample() -> None:
    assert torch.equal(
        resize_matrix_1d(8, 2) @ torch.arange(8.0, dtype=torch.float64), torch.tensor([1.5, 5.5]).double()
    )


@pytest.mark.parametrize(("old", "new"), list(combinations_with_replacement(SIZES, 2)))
def test_pi_resize_preserves_tokens_under_upsampling(old: PatchSize, new: PatchSize) -> None:
    """FlexiViT's defining property: resize the patch, project the weights, get the same token (Beyer et al. 2023)."""
    patch, weight = torch.randn(old.volume, dtype=torch.float64), torch.randn(old.volume, dtype=torch.float64)
    projected = embed_projection(old, new) @ weight
    torch.testing.assert_close(projected @ (resize_matrix(old, new) @ patch), weight @ patch)


def test_embed_projection_agrees_with_timm() -> None:
    weight = torch.randn(5, 3, 4, 4)
    theirs = resample_patch_embed(weight, [8, 8], interpolation="bilinear", antialias=False)
    ours = (weight.flatten(2).double() @ embed_projection(PatchSize(1, 4, 4), PatchSize(1, 8, 8)).T).float()
    torch.testing.assert_close(ours.view_as(theirs), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("underlying", SIZES)
def test_sharing_gives_back_the_pretrained_weights(underlying: PatchSize) -> None:
    embed, unembed = PatchEmbed(4, 16, BASE).double(), PatchUnembed(16, 8, BASE).double()
    nn.init.normal_(unembed.bias)
    before = [*embed.weights(BASE), *unembed.weights(BASE)]
    embed.share(underlying, SIZES)
    unembed.share(underlying, SIZES)
    embed.double(), unembed.double()
    after = [*embed.weights(BASE), *unembed.weights(BASE)]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-6)  # the matrices themselves are float32


@pytest.mark.parametrize("weak", [PatchSize.parse(4), PatchSize.parse(8)])
def test_a_weak_patch_starts_as_the_mean_patch_and_answers_with_its_copy(weak: PatchSize) -> None:
    """Embedding: the average of the small patches; de-embedding: each small pixel repeated, so the norm is kept."""
    embed, unembed = PatchEmbed(4, 16, BASE), PatchUnembed(16, 8, BASE)
    x, token = torch.randn(1, 4, weak.h, weak.w), torch.randn(1, 1, 16)
    small = F.avg_pool2d(x, weak.h // 2)
    expected_token = embed(small, patch_size=BASE)
    expected_patch = F.interpolate(unpatchify(unembed(token, patch_size=BASE), BASE, (2, 2)), weak.h, mode="nearest")
    for act in (PatchEmbed.share, PatchUnembed.share):
        act(embed if act is PatchEmbed.share else unembed, weak, [BASE, weak])  # type: ignore[arg-type]
    torch.testing.assert_close(embed(x, patch_size=weak), expected_token)
    patch = unpatchify(unembed(token, patch_size=weak), weak, (weak.h, weak.w))
    torch.testing.assert_close(patch, expected_patch)
    torch.testing.assert_close(patch.square().mean(), expected_patch.square().mean())


def test_own_weights_start_where_shared_ones_would() -> None:
    weak = PatchSize.parse(4)
    shared, own = PatchEmbed(4, 16, BASE), PatchEmbed(4, 16, BASE)
    own.load_state_dict(shared.state_dict())
    shared.share(weak, [BASE, weak])
    own.add_size(weak)
    for a, b in zip(shared.weights(weak), own.weights(weak), strict=True):
        torch.testing.assert_close(a, b)


def test_temporal_weights_are_duplicated_and_divided() -> None:
    """Appendix C.2: along time, the embedding is spread evenly over the frames; the output is copied to each."""
    base, weak = PatchSize(1, 2, 2), PatchSize(2, 2, 2)
    embed = PatchEmbed(3, 8, base, num_axes=3)
    unembed = PatchUnembed(8, 3, base)
    embed.add_size(weak), unembed.add_size(weak)
    kernel, old = embed.weights(weak)[0], embed.weights(base)[0]
    for frame in range(2):
        torch.testing.assert_close(kernel[:, :, frame], old[:, :, 0] / 2)
    wide = unembed.weights(weak)[0].unflatten(0, (2, 4, 3))
    for frame in range(2):
        torch.testing.assert_close(wide[frame], unembed.weights(base)[0].unflatten(0, (4, 3)))


def test_checkpoints_hold_no_derived_data() -> None:
    embed, unembed = PatchEmbed(4, 16, BASE), PatchUnembed(16, 8, BASE)
    embed.share(PatchSize.parse(4), SIZES), unembed.share(PatchSize.parse(4), SIZES)
    assert set(embed.state_dict()) == {"proj.weight", "proj.bias"}
    assert set(unembed.state_dict()) == {"weight", "bias"}


def test_unembed_projection_is_the_resize() -> None:
    assert torch.equal(unembed_projection(SIZES[2], BASE), resize_matrix(SIZES[2], BASE))
