"""Laws of the maximum mean discrepancy, and of the denoising chain that it is applied to."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexidit.diffusion import mmd
from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.diffusion.mmd import ChainPlan, bootstrapped_mmd_loss, denoise_chain, rbf_mmd, sample_time_pair
from flexidit.patch_size import PatchSize

WEAK, POWERFUL = PatchSize.parse(4), PatchSize.parse(2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# rbf_mmd


@pytest.mark.parametrize("bandwidths", [None, [0.5, 2.0]])
def test_biased_estimate_of_equal_sets_is_zero(bandwidths: list[float] | None) -> None:
    x = normal(20, 3, 2)
    assert rbf_mmd(x, x, bandwidths=bandwidths).item() == pytest.approx(0, abs=1e-14)
    assert rbf_mmd(x, x.flip(0), bandwidths=bandwidths).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_grows_with_the_shift(estimator: mmd.Estimator) -> None:
    x, y = normal(100, 4), normal(100, 4, seed=1)
    values = [rbf_mmd(x, y + shift, estimator=estimator).item() for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values) and values[1] > 0


def test_biased_estimate_is_never_negative_and_both_estimates_are_symmetric() -> None:
    for seed in range(5):
        x, y = normal(7, 2, seed=seed), normal(9, 2, seed=100 + seed)
        assert rbf_mmd(x, y).item() >= 0
        for estimator in ("biased", "unbiased"):
            torch.testing.assert_close(rbf_mmd(x, y, estimator=estimator), rbf_mmd(y, x, estimator=estimator))


def test_agrees_with_the_definition_written_as_loops() -> None:
    x, y, bandwidths = normal(4, 3), normal(5, 3, seed=1), [0.7, 1.5]

    def kernel(a: Tensor, b: Tensor) -> float:
        distance = float(((a - b) ** 2).sum())
        return sum(math.exp(-distance / (2 * b * b)) for b in bandwidths) / len(bandwidths)

    def mean(a: Tensor, b: Tensor, skip_same: bool = False) -> float:
        values = [kernel(a[i], b[j]) for i in range(len(a)) for j in range(len(b)) if not (skip_same and i == j)]
        return sum(values) / len(values)

    for estimator in ("biased", "unbiased"):
        skip = estimator == "unbiased"
        expected = mean(x, x, skip) + mean(y, y, skip) - 2 * mean(x, y)
        assert rbf_mmd(x, y, bandwidths=bandwidths, estimator=estimator).item() == pytest.approx(expected, abs=1e-13)


def gaussian_mmd(shift: float, var_x: float, var_y: float, dim: int, bandwidth: float) -> float:
    """MMD^2 of N(0, var_x I) and N(shift 1, var_y I), in closed form: kernels integrate to Gaussians."""

    def mean_kernel(distance: float, variance: float) -> float:
        total = bandwidth**2 + variance
        return (bandwidth**2 / total) ** (dim / 2) * math.exp(-distance / (2 * total))

    within = mean_kernel(0, 2 * var_x) + mean_kernel(0, 2 * var_y)
    return within - 2 * mean_kernel(dim * shift**2, var_x + var_y)


@pytest.mark.parametrize(("shift", "var_y"), [(0.0, 1.0), (0.7, 1.0), (0.0, 2.5)])
def test_estimates_agree_with_the_closed_form_of_two_gaussians(shift: float, var_y: float) -> None:
    """The unbiased one on average; the biased one exceeds it by what the diagonals add, 1/N (1 - E k) a set."""
    num_draws, n, dim, bandwidth = 400, 30, 2, 1.3
    x = normal(num_draws, n, dim)
    y = shift + math.sqrt(var_y) * normal(num_draws, n, dim, seed=1)
    draws: dict[str, Tensor] = {
        name: torch.stack([rbf_mmd(a, b, bandwidths=[bandwidth], estimator=name) for a, b in zip(x, y, strict=True)])
        for name in ("biased", "unbiased")
    }
    exact = gaussian_mmd(shift, 1.0, var_y, dim, bandwidth)
    error = (draws["unbiased"].std() / math.sqrt(num_draws)).item()
    assert draws["unbiased"].mean().item() == pytest.approx(exact, abs=4 * error)
    within = sum((bandwidth**2 / (bandwidth**2 + 2 * v)) ** (dim / 2) for v in (1.0, var_y))
    assert draws["biased"].mean().item() == pytest.approx(exact + (2 - within) / n, abs=4 * error)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_gradient_with_given_bandwidths(estimator: mmd.Estimator) -> None:
    x, y = normal(5, 2).requires_grad_(), normal(4, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rbf_mmd(a, b, bandwidths=[0.8, 2.0], estimator=estimator), (x, y))


def test_no_gradient_through_the_median_bandwidth() -> None:
    """Gradient of the default equals that with the same bandwidths given as numbers."""
    x, y = normal(6, 2), normal(5, 2, seed=1)
    median = torch.nn.functional.pdist(torch.cat([x, y])).square().median().item()
    given = [math.sqrt(factor * median) for factor in (0.25, 0.5, 1, 2, 4)]
    gradients = []
    for bandwidths in (None, given):
        leaf = x.clone().requires_grad_()
        rbf_mmd(leaf, y, bandwidths=bandwidths).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_does_not_depend_on_units_or_origin() -> None:
    x, y = normal(10, 3).float(), normal(10, 3, seed=1).float() + 0.3
    value = rbf_mmd(x, y)
    torch.testing.assert_close(rbf_mmd(1000 * x, 1000 * y), value)
    torch.testing.assert_close(rbf_mmd(x + 1000, y + 1000), value, rtol=1e-2, atol=1e-4)


def test_all_samples_in_one_point_give_zero_and_finite_gradients() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    value = rbf_mmd(x, torch.ones(3, 2))
    value.backward()
    assert value.item() == 0 and x.grad is not None and bool(x.grad.isfinite().all())


def test_computes_in_float32_under_autocast() -> None:
    x, y = normal(30, 8).float() + 5, normal(30, 8, seed=1).float() + 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = rbf_mmd(x, y)
    assert torch.equal(value, rbf_mmd(x, y))
    assert rbf_mmd(x.bfloat16(), y.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("num_x", "dim_y", "options", "message"),
    [
        (2, 4, {}, "one shape"),
        (0, 3, {}, "1 or more"),
        (1, 3, {"estimator": "unbiased"}, "2 or more"),
        (2, 3, {"bandwidths": [0.0]}, "positive"),
        (2, 3, {"bandwidths": []}, "positive"),
        (2, 3, {"estimator": "best"}, "'biased' or 'unbiased'"),
    ],
)
def test_wrong_sets_are_refused(num_x: int, dim_y: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rbf_mmd(torch.zeros(num_x, 3), torch.zeros(2, dim_y), **options)


# sample_time_pair and ChainPlan


def test_time_pairs_fit_lean_to_the_data_and_repeat() -> None:
    generator = seeded()
    pairs = [sample_time_pair(250, 10, generator=generator) for _ in range(2000)]
    assert all(0 <= t1 < t2 == t1 + 10 <= 249 for t1, t2 in pairs)
    cleaner_half = sum(t1 < 120 for t1, _ in pairs) / len(pairs)
    assert cleaner_half == pytest.approx(0.841, abs=0.03)  # P(normal < 1)
    assert sample_time_pair(250, 10, generator=seeded(3)) == sample_time_pair(250, 10, generator=seeded(3))


@pytest.mark.parametrize(("location", "t1"), [(-1e3, 0), (1e3, 239)])
def test_time_pairs_reach_both_ends_and_no_further(location: float, t1: int) -> None:
    assert sample_time_pair(250, 10, generator=seeded(), location=location) == (t1, t1 + 10)


def test_longest_chain_has_one_time_pair() -> None:
    assert sample_time_pair(250, 249, generator=seeded()) == (0, 249)
    for num_steps in (0, 250):
        with pytest.raises(ValueError, match="1 to 249 steps"):
            sample_time_pair(250, num_steps, generator=seeded())


def test_plan_goes_from_weak_to_powerful_in_any_order_given() -> None:
    plan = ChainPlan.from_steps({"2": 1, "1x8x8": 3, 4: 2})
    assert [size.h for size in plan] == [8, 8, 8, 4, 4, 2]
    assert (len(plan), plan.num_powerful_steps) == (6, 1)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one step"),
        (((WEAK, 0),), "at least one step"),
        (((POWERFUL, 1), (WEAK, 1)), "1x2x2:1, 1x4x4:1"),
        (((WEAK, 1), (WEAK, 1)), "weakest to the most powerful"),
    ],
)
def test_wrong_plans_are_refused(stages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChainPlan(stages)


# The chain


class ToyDenoiser(nn.Module):
    """Exact noise prediction for data N(0, s^2), plus an error per patch size; records its calls."""

    def __init__(self, diffusion: GaussianDiffusion, weak_error: float = 0.0, data_variance: float = 0.25) -> None:
        super().__init__()
        self.levels = dict(zip(diffusion.timestep_map, diffusion.alphas_cumprod.tolist(), strict=True))
        self.data_variance = data_variance
        self.errors = nn.ParameterDict(
            {
                WEAK.name: nn.Parameter(torch.full((1, 2, 2), weak_error, dtype=torch.float64)),
                POWERFUL.name: nn.Parameter(torch.zeros(1, 2, 2, dtype=torch.float64)),
            }
        )
        self.calls: list[tuple[str, int, bool]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor, patch_size: PatchSize) -> Tensor:
        assert len(t) == len(x) == len(y) and len(t.unique()) == 1
        self.calls.append((patch_size.name, int(t[0]), torch.is_grad_enabled()))
        level = self.levels[int(t[0])]
        exact = math.sqrt(1 - level) * x / (level * self.data_variance + 1 - level)
        return exact + self.errors[patch_size.name]


def toy_loss(denoise: Callable[..., Tensor], diffusion: GaussianDiffusion, *, n: int = 16, **options: Any) -> Tensor:
    x, x_other = 0.5 * normal(n, 1, 2, 2, seed=5), 0.5 * normal(n, 1, 2, 2, seed=6)
    options = {"plan": ChainPlan.from_steps({4: 3, 2: 2}), "times": (10, 15), "generator": seeded(7), **options}
    return bootstrapped_mmd_loss(denoise, diffusion, x, x_other, torch.zeros(n, dtype=torch.long), **options)


def test_chain_runs_weak_first_from_t2_down_to_t1_with_the_models_times() -> None:
    diffusion = GaussianDiffusion().respaced(50)
    denoiser = ToyDenoiser(diffusion)
    toy_loss(denoiser, diffusion)
    times = diffusion.timestep_map
    assert [call[:2] for call in denoiser.calls] == [
        (size, times[t]) for size, t in zip(["1x4x4"] * 3 + ["1x2x2"] * 2, [15, 14, 13, 12, 11], strict=True)
    ]


@pytest.mark.parametrize(("backprop_steps", "with_grad"), [(None, 2), (1, 1), (4, 4), (5, 5)])
def test_only_the_last_steps_carry_gradients(backprop_steps: int | None, with_grad: int) -> None:
    diffusion = GaussianDiffusion().respaced(50)
    denoiser = ToyDenoiser(diffusion, weak_error=1.0)
    toy_loss(denoiser, diffusion, backprop_steps=backprop_steps).backward()
    assert [call[2] for call in denoiser.calls] == [False] * (5 - with_grad) + [True] * with_grad
    assert denoiser.errors[POWERFUL.name].grad is not None
    assert (denoiser.errors[WEAK.name].grad is not None) == (with_grad > 2)


def test_number_of_backprop_steps_changes_gradients_only() -> None:
    diffusion = GaussianDiffusion().respaced(50)
    losses = [toy_loss(ToyDenoiser(diffusion), diffusion, backprop_steps=steps).item() for steps in (1, 5)]
    assert losses[0] == losses[1]


def test_gradient_through_the_whole_chain_is_exact() -> None:
    diffusion = GaussianDiffusion().respaced(50)
    denoiser = ToyDenoiser(diffusion)

    def loss(weak: Tensor, powerful: Tensor) -> Tensor:
        errors = {WEAK.name: weak, POWERFUL.name: powerful}
        return toy_loss(
            lambda x, t, y, size: denoiser(x, t, y, size) + errors[size.name],
            diffusion,
            n=4,
            bandwidths=[1.0, 3.0],
            backprop_steps=5,
        )

    assert torch.autograd.gradcheck(loss, (normal(1, 2, 2).requires_grad_(), normal(1, 2, 2, seed=1).requires_grad_()))


def test_no_gradients_are_kept_when_the_caller_wants_none() -> None:
    diffusion = GaussianDiffusion().respaced(50)
    with torch.no_grad():
        assert not toy_loss(ToyDenoiser(diffusion), diffusion).requires_grad


def test_steps_without_gradient_leave_no_weights_behind_in_the_autocast_cache() -> None:
    """Weights shared by weak and powerful steps must train under autocast, as they do without it."""
    diffusion, layer = GaussianDiffusion().respaced(50), nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = denoise_chain(
            lambda x, t, y, size: layer(x),
            diffusion,
            torch.ones(2, 4),
            20,
            torch.zeros(2),
            plan=ChainPlan.from_steps({4: 1, 2: 1}),
        )
    x.sum().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.any())


def test_nothing_waits_for_the_device() -> None:
    """On the meta device there are no values: whatever reads one (``item``, a mask as index) raises."""
    diffusion, x = GaussianDiffusion().respaced(50), torch.zeros(4, 1, 2, 2, device="meta")
    loss = bootstrapped_mmd_loss(
        lambda x_t, t, y, size: x_t,
        diffusion,
        x,
        x,
        torch.zeros(4, device="meta"),
        plan=ChainPlan.from_steps({4: 1, 2: 1}),
        times=(5, 7),
    )
    assert loss.is_meta and loss.shape == ()


def test_gather_receives_prediction_then_target() -> None:
    diffusion, seen = GaussianDiffusion().respaced(50), []

    def gather(x: Tensor) -> Tensor:
        seen.append(x.requires_grad)
        return x

    loss = toy_loss(ToyDenoiser(diffusion), diffusion, gather=gather)
    assert seen == [True, False]
    torch.testing.assert_close(loss, toy_loss(ToyDenoiser(diffusion), diffusion))
    x = normal(2, 2)
    assert mmd.gather_across_ranks(x) is x  # no process group here


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": (10, 14)}, "chain of 5 steps"),
        ({"times": (46, 51)}, "sample_time_pair"),
        ({"times": (-1, 4)}, "sample_time_pair"),
        ({"backprop_steps": 0}, "1 to 5"),
        ({"backprop_steps": 6}, "1 to 5"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    diffusion = GaussianDiffusion().respaced(50)
    with pytest.raises(ValueError, match=message):
        toy_loss(ToyDenoiser(diffusion), diffusion, **options)


def mismatch(denoiser: ToyDenoiser, diffusion: GaussianDiffusion) -> float:
    """Unbiased MMD^2 on held-out samples, averaged over three time pairs."""
    with torch.no_grad():
        values = [
            toy_loss(denoiser, diffusion, n=600, times=(t1, t1 + 5), generator=seeded(99 + t1), estimator="unbiased")
            for t1 in (5, 10, 20)
        ]
    return torch.stack(values).mean().item()


def test_training_lowers_the_mismatch_that_weak_steps_leave() -> None:
    """The weak size errs by a constant; the powerful one, exact at first, must learn to correct what it is handed."""
    diffusion = GaussianDiffusion().respaced(50)
    denoiser = ToyDenoiser(diffusion, weak_error=1.5)
    before = mismatch(denoiser, diffusion)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.1)
    generator, x_generator = seeded(1), seeded(2)
    for _ in range(80):
        x, x_other = 0.5 * torch.randn(2, 64, 1, 2, 2, generator=x_generator, dtype=torch.float64)
        plan = ChainPlan.from_steps({4: 3, 2: 2})
        loss = bootstrapped_mmd_loss(
            denoiser,
            diffusion,
            x,
            x_other,
            torch.zeros(64),
            plan=plan,
            times=sample_time_pair(50, len(plan), generator=generator),
            generator=x_generator,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = mismatch(denoiser, diffusion)
    assert before > 0.05 and after < before / 20  # 0.108 and 0.0006, next to 0.0003 with two exact sizes
    assert bool((denoiser.errors[POWERFUL.name] < -0.5).all())  # it leans against the weak error
    assert torch.equal(denoiser.errors[WEAK.name], torch.full_like(denoiser.errors[WEAK.name], 1.5))
