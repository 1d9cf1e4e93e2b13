"""Gradients: one norm for all, clipped as torch clips, poisoned by a loss that is not finite, or passed over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_modules.gradients import (
    clip_gradients,
    gradient_norm,
    leave_out_step,
    leaves_step_to_device,
    poison,
)
from lightning_modules.step_records import LeftOut, StepRecord, describe


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_the_norm_is_that_of_all_gradients_as_one_vector() -> None:
    module = network()
    module(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    whole = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(gradient_norm(module.parameters()), whole)
    assert float(gradient_norm(network().parameters())) == 0  # before any backward


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_clipping_is_torch_s_own_bit_for_bit(limit: float) -> None:
    module = network(torch.float32)
    module(torch.randn(5, 3)).square().sum().backward()
    other = copy.deepcopy(module)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    before = gradient_norm(module.parameters())
    assert torch.equal(clip_gradients(module.parameters(), None, None), before)  # and nothing else happened
    assert torch.equal(clip_gradients(module.parameters(), limit, None), before)
    nn.utils.clip_grad_norm_(other.parameters(), limit)
    assert all(torch.equal(a, b) for a, b in zip(gradients(module), gradients(other), strict=True) if a is not None)
    clip_gradients(module.parameters(), 1e-4, "value")
    assert max(float(g.abs().max()) for g in gradients(module) if g is not None) <= 1e-4


@pytest.mark.parametrize("factor", [1.0, 0.0, -3.0, 1e-30])
def test_a_finite_loss_has_its_gradients_bit_for_bit(factor: float) -> None:
    module, x = network(torch.float32), torch.randn(5, 3)
    found = []
    for poisons in (False, True):
        module.zero_grad()
        loss = module(x).square().mean() * factor
        if poisons:
            poison(loss)
        loss.backward()
        found.append(gradients(module))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_makes_every_gradient_nan(value: float) -> None:
    module = network(torch.float32)
    loss = module(torch.randn(5, 3)).square().mean() + value  # whose own gradients are finite
    poison(loss)
    loss.backward()
    assert all(bool(g.isnan().all()) for g in gradients(module) if g is not None)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_step_that_is_left_out_changes_neither_weights_nor_moments(fused: bool, is_first: bool) -> None:
    module = network(torch.float32)
    optimizer: Optimizer = AdamW(module.parameters(), lr=0.1, weight_decay=0.5, fused=fused)
    assert leaves_step_to_device(optimizer) is fused
    other = copy.deepcopy(module)
    expected: Optimizer = AdamW(other.parameters(), lr=0.1, weight_decay=0.5, fused=fused)
    steps = [1.0, 0.0, 0.0] if is_first else [0.0, 1.0, 0.0]
    for step, skipped in enumerate(steps):
        for one, by in ((module, optimizer), (other, expected)):
            by.zero_grad()
            one(torch.full((5, 3), float(step))).square().mean().backward()
            if one is module:
                leave_out_step(by, torch.tensor(skipped))
            if one is module or not skipped:
                by.step()
    assert all(map(torch.equal, module.parameters(), other.parameters()))
    for state, wanted in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert state.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in state.items())


@pytest.mark.gpu
def test_nobody_waits_for_the_device() -> None:
    module = network(torch.float32).cuda()
    optimizer = AdamW(module.parameters(), lr=0.1, fused=True)
    x = torch.full((5, 3), torch.nan, device="cuda")
    before = [p.detach().clone() for p in module.parameters()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = module(x).square().mean()
        poison(loss)
        loss.backward()
        norm = clip_gradients(module.parameters(), 1.0, None)
        record = StepRecord.of(0, "1x2x2", [["a"]], norm, [loss.detach()])
        leave_out_step(optimizer, 1 - norm.isfinite().float())
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, module.parameters(), before))
    assert not torch.tensor(record.read()[0]).isfinite()


def test_only_the_bad_micro_batches_are_blamed() -> None:
    record = StepRecord.of(
        3, "1x2x2", [["a", "b"], ["c"]], torch.tensor(torch.nan), [torch.tensor(1.0), torch.inf * torch.ones(())]
    )
    norm, losses = record.read()
    assert norm != norm
    left = LeftOut.of(record, losses)
    assert (left.bad, left.samples) == (["c"], ["a", "b", "c"])
    good = LeftOut(3, "1x2x2", [], ["d"])
    assert describe([good, left]) == "at patch size 1x2x2 the loss was not finite of rank 1 (c)"
    assert describe([good, good]).endswith("the gradient, though no loss, was not finite of rank 0 (d), rank 1 (d)")
    many = LeftOut(3, "1x2x2", [str(number) for number in range(9)], [])
    assert describe([many], limit=2).endswith("rank 0 (0, 1, and 7 more)")
