"""Draws are functions of their key: independent of order, rank, split of the batch, and of the global generator."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from flexidit.patch_size import PatchSize
from lightning_modules.draws import SampleDraws, draw_patch_size, keyed, places

SIZES = (PatchSize(1, 2, 2), PatchSize(1, 4, 4), PatchSize(1, 8, 8))
CPU = torch.device("cpu")


def draws(where: range, seed: int = 0, stream: str = "train", step: int = 5) -> SampleDraws:
    return SampleDraws(seed, stream, step, where)


def test_the_parts_of_a_key_do_not_run_into_one_another() -> None:
    assert len({keyed(1, 11), keyed(11, 1), keyed(1, 1, 1), keyed(111)}) == 4


def test_the_patch_size_is_a_pure_function_of_seed_and_step() -> None:
    first = [draw_patch_size(SIZES, (1, 1, 1), 0, step) for step in range(100)]
    torch.manual_seed(7)
    assert [draw_patch_size(SIZES, (1, 1, 1), 0, step) for step in range(100)] == first
    assert [draw_patch_size(SIZES, (1, 1, 1), 1, step) for step in range(100)] != first


def test_patch_sizes_come_as_often_as_their_weights_say() -> None:
    counts = Counter(draw_patch_size(SIZES, (3, 0, 1), 0, step) for step in range(4000))
    assert counts[SIZES[1]] == 0
    assert counts[SIZES[0]] / 4000 == pytest.approx(0.75, abs=0.025)  # 3.6 standard deviations


def test_processes_and_micro_batches_divide_the_global_batch() -> None:
    dealt = [place for rank in range(3) for first in (0, 4) for place in places(first, 4, rank, 3)]
    assert sorted(dealt) == list(range(24))


def test_a_sample_keeps_its_draws_however_the_batch_is_split() -> None:
    whole, part = draws(range(8)), draws(places(0, 4, rank=1, world_size=2))
    x = torch.empty(8, 2, 3, 3, dtype=torch.float64)
    assert torch.equal(whole.noise_like(x)[1::2], part.noise_like(x[:4]))
    assert torch.equal(whole.timesteps(range(1000), CPU)[1::2], part.timesteps(range(1000), CPU))
    assert torch.equal(whole.dropped(0.5, CPU)[1::2], part.dropped(0.5, CPU))


def test_draws_neither_use_nor_move_the_global_generator() -> None:
    x = torch.empty(2, 3)
    noise = draws(range(2)).noise_like(x)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(draws(range(2)).noise_like(x), noise)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("other", [{"seed": 1}, {"stream": "validation"}, {"step": 6}])
def test_seeds_streams_and_steps_draw_differently(other: dict[str, int | str]) -> None:
    x = torch.empty(4, 5)
    assert not torch.equal(draws(range(4)).noise_like(x), draws(range(4), **other).noise_like(x))


def test_draws_have_the_distributions_they_claim() -> None:
    many = draws(range(4000))
    t, noise = many.timesteps(range(1000), CPU), many.noise_like(torch.empty(4000, 16, dtype=torch.float64))
    assert (t.min(), t.max()) >= (0, 990)
    assert t.double().mean().item() == pytest.approx(499.5, abs=18)  # 4 standard errors
    assert many.dropped(0.1, CPU).double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.016)
    assert noise.var().item() == pytest.approx(1, abs=0.023)


def test_timesteps_stay_in_their_range_and_fill_it() -> None:
    times = draws(range(4000)).timesteps(range(400, 600), CPU)
    assert sorted(set(times.tolist())) == list(range(400, 600))
