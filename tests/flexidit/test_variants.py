from __future__ import annotations

import pytest
import torch

from flexidit import create_model
from flexidit.variants import known_variants, variant_config


def test_xl2_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = create_model("DiT-XL/2")
    assert sum(p.numel() for p in model.parameters()) == 675_129_632  # with the 256 x 1152 position table


def test_all_papers_variants_are_there() -> None:
    assert {f"DiT-{w}/{p}" for w in ("S", "B", "L", "XL") for p in (2, 4, 8)} <= set(known_variants())


def test_pixart_has_the_published_number_of_parameters() -> None:
    """603 tensors with 610,856,096 parameters in diffusers' PixArtTransformer2DModel XL/2, positions aside."""
    with torch.device("meta"):
        model = create_model("PixArt-XL/2-512")
    assert sum(p.numel() for n, p in model.named_parameters() if n != "pos_embed") == 610_856_096


def test_emu_has_about_as_many_parameters_as_the_paper_says() -> None:
    with torch.device("meta"):
        model = create_model("Emu-1.7B")
    assert model.base_patch_size.num_tokens(model.input_size) == 4096
    assert 1.5e9 < sum(p.numel() for p in model.parameters()) < 1.8e9


def test_wans_have_the_published_numbers_of_parameters() -> None:
    """825 tensors with 1,418,996,800 parameters in diffusers' WanTransformer3DModel; "14B" is 14.3 billion."""
    with torch.device("meta"):
        small, large = create_model("Wan-1.3B"), create_model("Wan-14B")
    assert len(small.state_dict()) == 825 and sum(p.numel() for p in small.parameters()) == 1_418_996_800
    assert small.config.mlp_width == 8960 and large.config.mlp_width == 13824
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(14.3e9, rel=0.01)


def test_overrides() -> None:
    config = variant_config("DiT-S/4", input_size=(8, 12), hidden_size=48, num_heads=4)
    assert (config.input_size, config.hidden_size, config.patch_size.name) == ((8, 12), 48, "1x4x4")


def test_unknown_names_and_fields_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'DiT-XL/2'.*DiT-S/2"):
        create_model("DiT-XL2")
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        create_model("DiT-S/2", hidden_sizes=3)
    with pytest.raises(ValueError, match="input_size"):
        create_model("DiT-S/2", input_size=(8, 8, 8, 8))
