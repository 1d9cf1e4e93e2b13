from __future__ import annotations

import pytest
import torch

from flexidit.conditions import Captions
from flexidit.sampling.batches import draw_batches, draw_seeds

CPU = torch.device("cpu")


def captions(count: int, first: float = 0.0, image_size: bool = False) -> Captions:
    """The i-th one is full of i, counted from ``first``."""
    numbers = first + torch.arange(count, dtype=torch.float32)
    sizes = torch.full((count, 2), 512) if image_size else None
    return Captions(numbers.view(-1, 1, 1).expand(-1, 3, 2), torch.ones(count, 3, dtype=torch.bool), sizes)


def shown(condition: Captions | torch.Tensor | None) -> list[float]:
    assert isinstance(condition, Captions)
    return condition.embeddings[:, 0, 0].tolist()


def test_the_last_batch_is_filled_with_copies_of_the_last_sample() -> None:
    batches = list(draw_batches(captions(5), None, [1, 2, 3, 4, 5], None, (5, 4, 2, 2), 2, CPU))
    assert [shown(batch.y) for batch in batches] == [[0, 1], [2, 3], [4, 4]]
    assert [batch.num_real for batch in batches] == [2, 2, 1] and {batch.num_batches for batch in batches} == {3}
    assert all(batch.noise.shape == (2, 4, 2, 2) and batch.negative is None for batch in batches)


def test_negative_conditions_stand_beside_their_own() -> None:
    for negative, expected in ((captions(3, 7), [[7, 8], [9, 9]]), (captions(1, 7), [[7, 7], [7, 7]])):
        batches = draw_batches(captions(3), negative, [1, 2, 3], None, (3, 4, 2, 2), 2, CPU)
        assert [shown(batch.negative) for batch in batches] == expected


def test_negative_captions_take_the_images_size() -> None:
    """Otherwise joining both would lose that of the conditional branch, too."""
    batches = draw_batches(captions(3, image_size=True), captions(1), [1, 2, 3], None, (3, 4, 2, 2), 2, CPU)
    for batch in batches:
        assert isinstance(batch.negative, Captions) and batch.negative.image_size is not None
        assert batch.negative.image_size.tolist() == [[512, 512]] * 2


def test_noise_is_drawn_from_each_samples_seed() -> None:
    whole = next(draw_batches(captions(3), None, [5, 6, 7], None, (3, 4, 2, 2), None, CPU))
    alone = next(draw_batches(captions(1), None, [6], None, (1, 4, 2, 2), None, CPU))
    assert torch.equal(whole.noise[1:2], alone.noise)
    given = torch.zeros(3, 4, 2, 2)
    told = next(draw_batches(captions(3), None, [5, 6, 7], given, (3, 4, 2, 2), None, CPU))
    states = [[generator.get_state() for generator in batch.generators] for batch in (whole, told)]
    assert torch.equal(told.noise, given) and all(map(torch.equal, *states))


def test_seeds() -> None:
    first, again = (draw_seeds(3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first == again and len(set(first)) == 3 and draw_seeds(3, None) != draw_seeds(3, None)


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        next(draw_batches(captions(2), None, [1, 2], None, (2, 4, 2, 2), 0, CPU))
