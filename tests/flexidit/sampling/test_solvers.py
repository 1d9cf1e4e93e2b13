import diffusers
import pytest
import torch

from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.sampling.solvers import SOLVERS, descending_timesteps, make_solver, uses_variance


def test_250_steps_are_those_of_published_dit():
    timesteps = make_solver("ddpm", 250).timesteps.tolist()
    assert timesteps[:5] == [999, 995, 991, 987, 983] and timesteps[-5:] == [16, 12, 8, 4, 0]
    assert timesteps == [round(index * 999 / 249) for index in reversed(range(250))]
    assert timesteps == list(GaussianDiffusion().respaced(250).timestep_map[::-1])


@pytest.mark.parametrize("num_steps", [2, 10, 25, 50, 100, 250, 1000])
def test_spacing_is_that_of_diffusers_linspace(num_steps):
    stock = diffusers.DDPMScheduler(timestep_spacing="linspace")
    stock.set_timesteps(num_steps)
    assert descending_timesteps(num_steps) == stock.timesteps.tolist()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50, 999])
def test_any_number_of_steps_starts_at_the_noisiest_and_descends(name, num_steps):
    timesteps = make_solver(name, num_steps, learn_sigma=True).timesteps
    assert len(timesteps) == num_steps and timesteps[0] == 999
    assert (timesteps.diff() < 0).all() and timesteps.device.type == "cpu"


@pytest.mark.parametrize("name", SOLVERS)
def test_noise_schedule_is_that_of_training(name):
    solver, diffusion = make_solver(name, 10), GaussianDiffusion()
    torch.testing.assert_close(solver.alphas_cumprod.double(), diffusion.alphas_cumprod, rtol=2e-4, atol=1e-7)


def test_another_number_of_train_timesteps():
    assert make_solver("ddpm", 3, num_train_timesteps=101).timesteps.tolist() == [100, 50, 0]


def test_only_ddpm_with_a_learned_variance_reads_it():
    assert uses_variance(make_solver("ddpm", 10, learn_sigma=True))
    assert not uses_variance(make_solver("ddpm", 10, learn_sigma=False))
    assert not any(uses_variance(make_solver(name, 10, learn_sigma=True)) for name in ("ddim", "dpm++", "sa"))


def test_ddim_is_stock_ddim_where_that_steps_evenly():
    """DDIMScheduler is consistent with itself if its spacing is 1000 // steps: "trailing" and a divisor of 1000."""
    stock = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    stock.set_timesteps(20)
    ours = make_solver(diffusers.DPMSolverMultistepScheduler(solver_order=1, timestep_spacing="trailing"), 20)
    assert type(ours) is type(make_solver("ddim", 20)) and make_solver("ddim", 20).config.solver_order == 1
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    x = y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in stock.timesteps:
        x = stock.step(0.3 * x.sin(), t, x).prev_sample
        y = ours.step(0.3 * y.sin(), t, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_ddim_step_is_the_closed_form_on_dit_timesteps():
    solver, alphas = make_solver("ddim", 7), GaussianDiffusion().alphas_cumprod
    timesteps = solver.timesteps.tolist()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
        eps = 0.5 * x.cos()
        level = 1.0 if previous is None else alphas[previous].item()
        x_start = (x.double() - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
        expected = level**0.5 * x_start + (1 - level) ** 0.5 * eps
        x = solver.step(eps, torch.tensor(t), x, return_dict=False)[0]
        torch.testing.assert_close(x.double(), expected, rtol=1e-3, atol=1e-3)


def test_given_solver_is_copied_and_its_learned_variance_disarmed():
    given = diffusers.DPMSolverMultistepScheduler(variance_type="learned_range")
    built = make_solver(given, 10, learn_sigma=True)
    assert built is not given and given.num_inference_steps is None
    assert built.config.variance_type is None and given.config.variance_type == "learned_range"
    eps = torch.ones(1, 4, 2, 2)  # stock code would keep three of the four channels and fail
    assert built.step(eps, built.timesteps[0], eps).prev_sample.shape == eps.shape


@pytest.mark.parametrize(
    ("solver", "num_steps", "sentence"),
    [
        ("ddmp", 10, "unknown solver 'ddmp'; give one of ddpm, ddim, dpm\\+\\+, sa"),
        (42, 10, "unknown solver 42"),
        ("ddpm", 0, "cannot sample in 0 steps"),
        ("ddim", 1001, "take 1 to 1000"),
        ("dpm++", 1000, "repeats timesteps"),
        (diffusers.HeunDiscreteScheduler(), 10, "makes 19 model calls for 10 steps"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), 10, "needs a learned variance"),
    ],
)
def test_refusals(solver, num_steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_solver(solver, num_steps)
