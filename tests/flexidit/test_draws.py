import pytest
import torch

from flexidit.draws import Draw, draw_choice, draw_flip, draw_noise, draw_uniform


def test_noise_is_a_pure_function():
    assert torch.equal(draw_noise(1, Draw(2, 3), (4, 5)), draw_noise(1, Draw(2, 3), (4, 5)))


@pytest.mark.parametrize("seed, draw", [(0, Draw(2, 3)), (1, Draw(3, 3)), (1, Draw(2, 4)), (3, Draw(2, 1))])
def test_noise_depends_on_each_of_seed_sample_and_epoch(seed, draw):
    assert not torch.equal(draw_noise(1, Draw(2, 3), (8,)), draw_noise(seed, draw, (8,)))


def test_noise_of_many_samples_is_standard_normal_and_uncorrelated():
    noise = torch.stack([draw_noise(0, Draw(sample), (200,)) for sample in range(200)]).double()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.var() - 1) < 0.03
    assert abs((noise[:-1] * noise[1:]).mean()) < 0.02


def test_flips_are_fair_and_change_with_the_epoch():
    flips = torch.tensor([[draw_flip(0, Draw(sample, epoch)) for sample in range(400)] for epoch in range(2)])
    assert abs(flips.double().mean() - 0.5) < 0.06
    assert 0.4 < (flips[0] != flips[1]).double().mean() < 0.6


def test_a_plain_index_means_epoch_0():
    assert Draw.of(7) == Draw(7, 0)
    assert Draw.of(Draw(7, 2)) == Draw(7, 2)


def test_choices_are_even_and_change_with_the_epoch():
    choices = torch.tensor([[draw_choice(0, Draw(sample, epoch), 5) for sample in range(1000)] for epoch in range(2)])
    assert all(abs(count - 400) < 60 for count in choices.flatten().bincount().tolist())
    assert abs((choices[0] == choices[1]).double().mean() - 0.2) < 0.05
    assert draw_choice(3, Draw(2, 1), 5) == draw_choice(3, Draw(2, 1), 5)


def test_one_thing_is_always_chosen_and_the_flip_does_not_decide():
    assert {draw_choice(0, Draw(sample), 1) for sample in range(20)} == {0}
    same = [draw_flip(0, Draw(sample)) == bool(draw_choice(0, Draw(sample), 2)) for sample in range(1000)]
    assert abs(sum(same) / 1000 - 0.5) < 0.06


def test_uniform_numbers_are_a_pure_function_of_seed_epoch_and_sample():
    draws = [Draw(sample, epoch) for sample in range(200) for epoch in range(2)]
    numbers = torch.tensor([draw_uniform(0, draw, 5).tolist() for draw in draws])
    assert len(numbers.unique(dim=0)) == len(draws)
    assert abs(numbers.mean() - 0.5) < 0.03 and numbers.min() >= 0 and numbers.max() < 1
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.2
    assert draw_uniform(0, draws[3], 2).tolist() == draw_uniform(0, draws[3], 5)[:2].tolist()
    assert draw_uniform(1, draws[3], 2).tolist() != draw_uniform(0, draws[3], 2).tolist()
