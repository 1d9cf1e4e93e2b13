from __future__ import annotations

import pytest
import torch

from flexidit.conditions import CaptionKeys, Captions, choose, join


def captions(count: int, num_tokens: int, first: float = 0.0) -> Captions:
    values = first + torch.arange(count * num_tokens * 2, dtype=torch.float32)
    mask = torch.ones(count, num_tokens, dtype=torch.bool)
    mask[:, num_tokens - 1] = False
    return Captions(values.view(count, num_tokens, 2), mask)


def test_joining_is_the_inverse_of_slicing() -> None:
    whole = captions(5, 3)
    again = join([whole[:2], whole[2:]])
    assert torch.equal(again.embeddings, whole.embeddings) and torch.equal(again.mask, whole.mask)
    assert len(again) == 5 and again.image_size is None


def test_shorter_captions_get_hidden_tokens() -> None:
    short, long = captions(1, 2), captions(2, 4)
    both = join([short, long])
    assert both.embeddings.shape == (3, 4, 2)
    assert both.mask.tolist() == [[True, False, False, False]] + [[True, True, True, False]] * 2
    assert torch.equal(both.embeddings[:1, :2], short.embeddings)


def test_labels_are_conditions_too() -> None:
    rows = torch.tensor([True, False, True])
    assert choose(rows, torch.tensor([10, 10, 10]), torch.tensor([1, 2, 3])).tolist() == [10, 2, 10]
    assert join([torch.tensor([1]), torch.tensor([2, 3])]).tolist() == [1, 2, 3]


def test_choosing_takes_each_from_its_side() -> None:
    these, those = captions(3, 2, first=100), captions(3, 4)
    chosen = choose(torch.tensor([True, False, True]), these, those)
    assert chosen.num_tokens == 4
    assert torch.equal(chosen.embeddings[1], those.embeddings[1])
    assert torch.equal(chosen.embeddings[[0, 2], :2], these.embeddings[[0, 2]])
    assert chosen.mask[0].tolist() == [True, False, False, False]


def test_keys_are_chosen_block_by_block() -> None:
    mask, rows = torch.ones(2, 3, dtype=torch.bool), torch.tensor([True, False])
    these, those = (CaptionKeys((torch.randn(2, 3, 4), torch.randn(2, 3, 4)), mask) for _ in range(2))
    chosen = choose(rows, these, those).keys_values
    for own, a, b in zip(chosen, these.keys_values, those.keys_values, strict=True):
        assert torch.equal(own, torch.stack([a[0], b[1]]))


def test_keys_are_sliced_and_joined_block_by_block() -> None:
    keys = CaptionKeys((torch.randn(4, 3, 8), torch.randn(4, 3, 8)), torch.ones(4, 3, dtype=torch.bool))
    again = join([keys[:1], keys[torch.tensor([1, 2, 3])]])
    assert all(torch.equal(a, b) for a, b in zip(again.keys_values, keys.keys_values, strict=True))


def test_image_sizes_follow_their_samples() -> None:
    sized = Captions(torch.zeros(2, 1, 2), torch.ones(2, 1, dtype=torch.bool), torch.tensor([[512, 256], [64, 64]]))
    assert sized[1:].image_size is not None and sized[1:].image_size.tolist() == [[64, 64]]
    moved = sized.to("cpu")
    assert moved.image_size is not None and moved.device.type == "cpu"


def test_a_mask_must_be_boolean_and_fit() -> None:
    for mask in (torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="boolean mask"):
            Captions(torch.zeros(2, 3, 4), mask)


def test_embeddings_of_other_types_join_under_any_autocast() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    parts = [Captions(torch.ones(1, 2, 3, dtype=kind), mask) for kind in (torch.bfloat16, torch.float32)]
    with torch.autocast("cpu", dtype=torch.float16):
        assert join(parts).embeddings.dtype == torch.float32
        assert join(parts[:1] * 2).embeddings.dtype == torch.bfloat16
