"""The training loss against golden numbers of DiT's code, and its laws."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.diffusion.losses import TrainingLoss, discretized_log_likelihood, normal_kl, training_loss

GOLDEN = json.loads((Path(__file__).parent / "golden_dit_loss.json").read_text())
SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "golden_dit_loss.py"))


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    x: dict[str, Tensor] = SCRIPT["golden_inputs"](dtype)
    return x


def loss_of(x: dict[str, Tensor], learn_sigma: bool = True) -> TrainingLoss:
    diffusion = GaussianDiffusion()
    x_t = diffusion.q_sample(x["x_start"], x["t"], x["noise"])
    return training_loss(diffusion, x["model_output"], x["x_start"], x_t, x["t"], x["noise"], learn_sigma)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_dit(dtype: torch.dtype) -> None:
    golden = GOLDEN["loss"][str(dtype).removeprefix("torch.")]
    loss = loss_of(inputs(dtype))
    for actual, name in ((loss.total, "loss"), (loss.mse, "mse"), (loss.vb, "vb")):
        assert actual.dtype == dtype
        expected = torch.tensor(golden[name], dtype=dtype)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_gradients_agree_with_dit() -> None:
    x, golden = inputs(), GOLDEN["loss"]["float64"]
    output = x["model_output"].requires_grad_()
    loss_of(x).total.sum().backward()
    assert output.grad is not None
    for grad, name in zip(output.grad.chunk(2, dim=1), ("grad_eps", "grad_variance"), strict=True):
        expected = torch.tensor(golden[name], dtype=torch.float64)
        torch.testing.assert_close(grad.flatten(1).norm(dim=1), expected, rtol=1e-5, atol=1e-8)


def test_bound_trains_the_variance_only() -> None:
    x = inputs()
    output = x["model_output"].requires_grad_()
    loss_of(x).vb.sum().backward()
    assert output.grad is not None
    eps, variance = output.grad.chunk(2, dim=1)
    assert not eps.any() and variance.any()


def test_perfect_model_has_no_loss_above_t_0() -> None:
    """Right noise and the posterior's variance: zero squared error, zero divergence."""
    x = inputs()
    x["model_output"] = torch.cat([x["noise"], -torch.ones_like(x["noise"])], dim=1)
    loss = loss_of(x)
    assert not loss.mse.any()
    torch.testing.assert_close(loss.vb[1:], torch.zeros_like(loss.vb[1:]), rtol=0, atol=1e-12)


def test_without_learned_variance_only_the_squared_error_is_left() -> None:
    x = inputs()
    with_variance = loss_of(x)
    x["model_output"] = x["model_output"][:, :2]
    loss = loss_of(x, learn_sigma=False)
    torch.testing.assert_close(loss.total, with_variance.mse)
    assert not loss.vb.any()


def test_half_precision_output_is_raised_to_float32() -> None:
    x = inputs(torch.float32)
    exact = loss_of(x)
    x["model_output"] = x["model_output"].bfloat16()
    loss = loss_of(x)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, exact.total, rtol=0.05, atol=0.01)


def test_nothing_waits_for_the_device() -> None:
    """On the meta device there are no values: whatever reads one raises."""
    loss = loss_of({name: value.to("meta") for name, value in inputs().items()})
    assert loss.total.is_meta and loss.total.shape == (8,)


def test_samples_do_not_mix() -> None:
    x = inputs()
    alone = {name: value[3:4] for name, value in x.items()}
    torch.testing.assert_close(loss_of(alone).total, loss_of(x).total[3:4])


def test_kl_agrees_with_torch() -> None:
    mean = torch.linspace(-2, 2, 9, dtype=torch.float64)
    log_variance = torch.linspace(1, -3, 9, dtype=torch.float64)
    p = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    q = torch.distributions.Normal(0.1, math.exp(0.2))
    ours = normal_kl(mean, log_variance, torch.tensor(0.1), torch.tensor(0.4))
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(p, q), rtol=1e-6, atol=1e-6)


def test_discretized_probabilities_sum_to_one() -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.3, -3.0), (-0.99, -1.0), (2.0, 0.5)):
        log_probability = discretized_log_likelihood(levels, torch.tensor(mean), torch.tensor(log_scale))
        assert log_probability.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_output_channels_must_fit() -> None:
    with pytest.raises(ValueError, match="learn_sigma=False needs 2 output channels, got 4"):
        loss_of(inputs(), learn_sigma=False)
