"""Laws of the discrete Gaussian diffusion, golden numbers of DiT's code, and diffusers' DDPM as a peer."""

import copy
import json
import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexidit.diffusion.gaussian import GaussianDiffusion, even_timesteps, split_output

GOLDEN = json.loads((Path(__file__).parent / "golden_dit_loss.json").read_text())
SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "golden_dit_loss.py"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, golden: list[float]) -> None:
    torch.testing.assert_close(actual.flatten(), torch.tensor(golden, dtype=actual.dtype), rtol=1e-5, atol=1e-5)


def test_schedule_is_linear_from_data_to_noise() -> None:
    diffusion = GaussianDiffusion()
    assert (diffusion.num_timesteps, diffusion.betas[0].item(), diffusion.betas[-1].item()) == (1000, 1e-4, 0.02)
    assert bool((diffusion.betas.diff().diff().abs() < 1e-15).all())
    assert bool((diffusion.alphas_cumprod.diff() < 0).all())  # index 0 is the cleanest level
    assert diffusion.alphas_cumprod[0] > 0.999 and diffusion.alphas_cumprod[-1] < 1e-4


def test_predictions_invert_q_sample() -> None:
    diffusion, x_start, noise = GaussianDiffusion(), normal(5, 3, 4, 2), normal(5, 3, 4, 2, seed=1)
    t = torch.tensor([0, 1, 400, 998, 999])
    x_t = diffusion.q_sample(x_start, t, noise)
    torch.testing.assert_close(diffusion.predict_x_start(x_t, t, noise), x_start, rtol=0, atol=1e-11)
    torch.testing.assert_close(diffusion.predict_eps(x_t, t, x_start), noise, rtol=0, atol=1e-11)


def test_q_posterior_follows_bayes() -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): a product of two Gaussians."""
    diffusion, x_start, x_t = GaussianDiffusion(), normal(3, 1, 2), normal(3, 1, 2, seed=1)
    t = torch.tensor([1, 300, 999])
    beta, before = (table.view(-1, 1, 1) for table in (diffusion.betas[t], diffusion.alphas_cumprod[t - 1]))
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() / beta * x_t + before.sqrt() / (1 - before) * x_start) / precision
    posterior = diffusion.q_posterior(x_start, x_t, t)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.variance, 1 / precision, rtol=1e-10, atol=0)


def test_learned_variance_lies_between_its_bounds() -> None:
    diffusion, x_t, t = GaussianDiffusion(), normal(2, 1, 2), torch.tensor([7, 700])
    eps = normal(2, 1, 2, seed=1)
    for value, name in ((-1.0, "small"), (1.0, "large")):
        learned = diffusion.p_mean_variance(torch.cat([eps, torch.full_like(eps, value)], dim=1), x_t, t)
        fixed = diffusion.p_mean_variance(eps, x_t, t, fixed_variance=name)  # type: ignore[arg-type]
        torch.testing.assert_close(learned.log_variance, fixed.log_variance.expand_as(x_t))
        torch.testing.assert_close(learned.mean, fixed.mean)


def test_respacing_keeps_the_noise_levels() -> None:
    diffusion = GaussianDiffusion()
    short = diffusion.respaced(50)
    assert short.num_timesteps == 50
    torch.testing.assert_close(short.alphas_cumprod, diffusion.alphas_cumprod[list(short.timestep_map)])
    assert short.model_timesteps(torch.tensor([0, 1, 49])).tolist() == [0, 20, 999]
    assert short.respaced(5).timestep_map[-1] == 999  # maps compose
    same = diffusion.respaced(1000)
    assert same.timestep_map == diffusion.timestep_map
    torch.testing.assert_close(same.betas, diffusion.betas, rtol=1e-10, atol=0)


def test_steps_leave_the_true_marginal_unchanged() -> None:
    """With the exact noise prediction for data N(0, s^2), a step from q(x_t) must give the moments of q(x_{t-1})."""
    diffusion, data_variance, t = GaussianDiffusion().respaced(250), 0.3, 120
    level, before = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod[t - 1]
    x_t = normal(200_000, 1) * (level * data_variance + 1 - level).sqrt()
    eps = (1 - level).sqrt() * x_t / (level * data_variance + 1 - level)
    x = diffusion.ddpm_step(eps, x_t, torch.full((200_000,), t), normal(200_000, 1, seed=1), fixed_variance="small")
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    # The posterior of a single x_0 is narrower than that of the data, by less than one beta.
    assert x.var().item() == pytest.approx((before * data_variance + 1 - before).item(), abs=0.01)


@pytest.mark.parametrize("num_steps", [250, 50, 23])
def test_agrees_with_dit(num_steps: int) -> None:
    golden, x = GOLDEN["respaced"][str(num_steps)], SCRIPT["golden_inputs"](torch.float64)
    diffusion, t = GaussianDiffusion().respaced(num_steps), SCRIPT["respaced_times"](num_steps)
    assert list(diffusion.timestep_map) == golden["timestep_map"]
    x_t = diffusion.q_sample(x["x_start"], t, x["noise"])
    close(x_t, golden["q_sample"])
    p = diffusion.p_mean_variance(x["model_output"], x_t, t)
    close(p.mean, golden["mean"])
    close(p.log_variance, golden["log_variance"])
    close(p.x_start, golden["pred_xstart"])
    for name in ("small", "large"):
        fixed = diffusion.p_mean_variance(x["model_output"][:, :2], x_t, t, fixed_variance=name)  # type: ignore[arg-type]
        close(fixed.log_variance, golden[f"log_variance_{name}"])


def diffusers_scheduler(num_steps: int, variance_type: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, variance_type=variance_type, timestep_spacing="linspace", clip_sample=False
    )
    scheduler.alphas_cumprod = GaussianDiffusion().alphas_cumprod  # its own are float32, too coarse for this comparison
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("num_steps", [250, 50])
@pytest.mark.parametrize(("variance_type", "channels"), [("learned_range", 4), ("fixed_large", 2), ("fixed_small", 2)])
def test_ddpm_step_agrees_with_diffusers(num_steps: int, variance_type: str, channels: int) -> None:
    scheduler, diffusion = diffusers_scheduler(num_steps, variance_type), GaussianDiffusion().respaced(num_steps)
    assert scheduler.timesteps.tolist() == list(reversed(diffusion.timestep_map))
    x_t, model_output = normal(3, 2, 2, 2), normal(3, channels, 2, 2, seed=1)
    for index in (0, 1, num_steps // 2, num_steps - 1):
        noise = normal(3, 2, 2, 2, seed=2)  # what the scheduler draws from the same seed
        expected = scheduler.step(
            model_output, diffusion.timestep_map[index], x_t, generator=torch.Generator().manual_seed(2)
        ).prev_sample
        fixed = "small" if variance_type == "fixed_small" else "large"
        actual = diffusion.ddpm_step(model_output, x_t, torch.full((3,), index), noise, fixed_variance=fixed)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_even_timesteps_are_not_linspace() -> None:
    """Accumulated positions may come to 499.4999... where linspace has 499.5; the golden numbers for 23 steps agree."""
    assert even_timesteps(1000, 3) == [0, 500, 999]
    assert even_timesteps(10, 10) == list(range(10))
    linspace = torch.linspace(0, 999, 23, dtype=torch.float64).round().int().tolist()
    assert even_timesteps(1000, 23) != linspace and even_timesteps(1000, 23)[-1] == 999


def test_step_to_data_adds_no_noise_and_times_may_differ_per_sample() -> None:
    diffusion, t = GaussianDiffusion(), torch.tensor([0, 5, 900])
    x_t, output, noise = normal(3, 1, 2), normal(3, 2, 2, seed=1), normal(3, 1, 2, seed=2)
    x = diffusion.ddpm_step(output, x_t, t, noise)
    torch.testing.assert_close(x[:1], diffusion.p_mean_variance(output, x_t, t).mean[:1])
    for i in range(3):
        alone = diffusion.ddpm_step(output[i : i + 1], x_t[i : i + 1], t[i : i + 1], noise[i : i + 1])
        torch.testing.assert_close(x[i : i + 1], alone)


def test_ddpm_step_is_differentiable() -> None:
    diffusion, noise, t = GaussianDiffusion().respaced(50), normal(2, 1, 2, seed=2), torch.tensor([0, 30])
    output, x_t = normal(2, 2, 2).requires_grad_(), normal(2, 1, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: diffusion.ddpm_step(a, b, t, noise), (output, x_t))


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_results_are_at_least_float32(dtype: torch.dtype, result: torch.dtype) -> None:
    x, t = normal(2, 1, 2).to(dtype), torch.tensor([3, 800])
    x_t = GaussianDiffusion().q_sample(x, t, x)
    assert x_t.dtype == result
    exact = GaussianDiffusion().q_sample(x.double(), t, x.double())
    torch.testing.assert_close(x_t.double(), exact, rtol=1e-6, atol=1e-6)


def test_first_use_in_inference_mode_does_not_spoil_later_gradients() -> None:
    with torch.inference_mode():
        diffusion = GaussianDiffusion().respaced(10)
        diffusion.q_sample(torch.zeros(1, 1), torch.tensor([3]), torch.zeros(1, 1))
    x = torch.zeros(1, 1, requires_grad=True)
    diffusion.q_sample(x, torch.tensor([3]), torch.ones(1, 1)).sum().backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(diffusion.alphas_cumprod[3].sqrt().item())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"])
def test_copies_work(copier: Any) -> None:
    diffusion, t = GaussianDiffusion(), torch.tensor([10])
    x = diffusion.q_sample(torch.ones(1, 1), t, torch.ones(1, 1))
    assert torch.equal(copier(diffusion).q_sample(torch.ones(1, 1), t, torch.ones(1, 1)), x)


def test_tables_survive_a_default_meta_device() -> None:
    with torch.device("meta"):
        diffusion = GaussianDiffusion().respaced(250)
    assert diffusion.q_sample(torch.ones(1, 1), torch.tensor([249]), torch.zeros(1, 1)).item() < 0.01


def test_inputs_are_left_unchanged() -> None:
    x, t = normal(2, 2, 2), torch.tensor([3, 8])
    before = x.clone()
    GaussianDiffusion().ddpm_step(x, x, t, x)
    assert torch.equal(x, before)


def test_wrong_input_is_refused_in_one_sentence() -> None:
    diffusion, x = GaussianDiffusion(), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="2 to 1000"):
        diffusion.respaced(1)
    with pytest.raises(ValueError, match="2 to 1000"):
        diffusion.respaced(1001)
    with pytest.raises(ValueError, match="one integer step index for each of the 2 samples"):
        diffusion.q_sample(x, torch.tensor(3), x)
    with pytest.raises(ValueError, match="one integer step index"):
        diffusion.q_sample(x, torch.tensor([3.0, 3.0]), x)
    with pytest.raises(ValueError, match="'small' or 'large'"):
        diffusion.p_mean_variance(x, x, torch.tensor([3, 3]), fixed_variance="medium")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"3 \(noise\) or 6"):
        split_output(torch.zeros(2, 4), 3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        GaussianDiffusion(beta_end=2.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        GaussianDiffusion(1)
    with pytest.raises(ValueError, match="map of 1"):
        GaussianDiffusion.from_betas(torch.tensor([0.1, 0.2]), [0])
