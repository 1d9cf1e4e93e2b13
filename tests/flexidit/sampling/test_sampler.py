from itertools import pairwise

import diffusers
import pytest
import torch
from torch import Tensor, nn

from flexidit import flexify
from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.patch_size import PatchSize
from flexidit.sampling.sampler import Call, Sampler
from flexidit.sampling.schedule import PatchSchedule
from flexidit.sampling.solvers import SOLVERS, make_solver
from flexidit.variants import create_model

WEAK, POWERFUL = PatchSize.parse(4), PatchSize.parse(2)
ALPHAS = GaussianDiffusion().alphas_cumprod


class GaussianDenoiser:
    """The exact eps of data ~ N(mean_y, std^2), each element independent; the null label has mean 0.

    Given the timesteps that will be visited, it also returns the exact variance of the reverse step.
    """

    in_channels, input_size, patch_sizes = 4, (8, 8), (POWERFUL, WEAK)

    def __init__(self, std: float = 0.5, timesteps: list[int] | None = None) -> None:
        self.std, self.learn_sigma, self.num_calls = std, timesteps is not None, 0
        self.previous = dict(pairwise(timesteps)) if timesteps else {}

    def null_condition(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *, patch_size: PatchSize) -> Tensor:
        self.num_calls += 1
        alpha = ALPHAS[int(t[0])].item()
        mean = (y.to(x.dtype) / 4).view(-1, 1, 1, 1)
        eps = (1 - alpha) ** 0.5 * (x - alpha**0.5 * mean) / (alpha * self.std**2 + 1 - alpha)
        if not self.learn_sigma:
            return eps
        return torch.cat([eps, torch.full_like(eps, self.variance_channel(int(t[0])))], dim=1)

    def variance_channel(self, t: int) -> float:
        """Where the exact log variance lies between DiT's bounds, -1 for the posterior's and 1 for beta."""
        if t not in self.previous:
            return 0.0
        alpha, last = ALPHAS[t], ALPHAS[self.previous[t]]
        beta = 1 - alpha / last
        small = (1 - last) / (1 - alpha) * beta
        var_x_start = self.std**2 * (1 - alpha) / (alpha * self.std**2 + 1 - alpha)
        exact = small + last * (beta / (1 - alpha)) ** 2 * var_x_start
        return (2 * (exact / small).log() / (beta / small).log() - 1).item()


def constant(num_steps: int, size: int = 2) -> PatchSchedule:
    return PatchSchedule.constant(size, num_steps)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return perturbed(create_model("DiT-Tiny/2", num_classes=10, input_size=8, depth=1))


def perturbed(module: nn.Module) -> nn.Module:
    """DiT starts with zero output; random weights make its predictions depend on everything."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return module


def assert_moments(samples: Tensor, mean: float, std: float) -> None:
    assert samples.mean().item() == pytest.approx(mean, abs=0.01)
    assert samples.std().item() == pytest.approx(std, abs=0.01)


@pytest.mark.parametrize(("solver", "num_steps"), [("ddpm", 1000), ("ddim", 250), ("dpm++", 60), ("sa", 60)])
def test_samples_of_a_gaussian_have_its_moments(solver, num_steps):
    """DDPM takes all its steps: in fewer, its posterior variance is too small (0.485 instead of 0.5 in 250)."""
    sampler = Sampler(GaussianDenoiser(), solver, schedule=constant(num_steps))
    samples = sampler([3] * 16, size=(32, 32), generator=seeded())  # 65536 elements: standard error 0.002
    assert_moments(samples, mean=0.75, std=0.5)


def test_ddpm_with_the_exact_learned_variance_is_exact_in_few_steps():
    timesteps = make_solver("ddpm", 12).timesteps.tolist()
    schedule = constant(12)
    learned = Sampler(GaussianDenoiser(0.7, timesteps), schedule=schedule)(torch.full((256,), 3), generator=seeded())
    assert_moments(learned, mean=0.75, std=0.7)
    fixed = Sampler(GaussianDenoiser(0.7), schedule=schedule)(torch.full((256,), 3), generator=seeded())
    assert fixed.std() < 0.68  # the posterior variance is too small: the variance channels were used above


def test_solver_that_keeps_its_state_at_another_scale():
    given = diffusers.EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace")
    sampler = Sampler(GaussianDenoiser(), given, schedule=constant(200))
    assert_moments(sampler(torch.full((256,), 3), generator=seeded()), mean=0.75, std=0.5)


def test_guidance_moves_the_mean_as_the_formula_says():
    """Equal variances make guided eps that of a Gaussian whose mean is extrapolated from 0 by the scale."""
    sampler = Sampler(GaussianDenoiser(), "ddim", schedule=constant(250), cfg_scale=2.0)
    assert_moments(sampler(torch.full((256,), 3), generator=seeded()), mean=1.5, std=0.5)


def stock_solver(name: str) -> object:
    match name:
        case "ddpm":
            return diffusers.DDPMScheduler(
                clip_sample=False, timestep_spacing="linspace", variance_type="learned_range"
            )
        case "dpm++":
            return diffusers.DPMSolverMultistepScheduler()
        case "sa":
            return diffusers.SASolverScheduler()
        case _:
            return diffusers.DPMSolverMultistepScheduler(solver_order=1)


@pytest.mark.parametrize("name", SOLVERS)
def test_equals_a_plain_diffusers_loop(model, name):
    """The loop of a stock pipeline with classifier-free guidance, written out; one generator per sample."""
    y, num_steps, scale = torch.tensor([1, 7]), 10, 3.0
    seeds = torch.randint(2**63 - 1, (2,), generator=seeded()).tolist()
    generators = [seeded(seed) for seed in seeds]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
    solver = stock_solver(name)
    if name == "ddim":
        solver.set_timesteps(timesteps=make_solver("ddpm", num_steps).timesteps.tolist())
    else:
        solver.set_timesteps(num_steps)
    random = {"generator": generators}
    with torch.no_grad():
        for t in solver.timesteps:
            both = model.eval()(torch.cat([x, x]), t.repeat(4), torch.cat([y, torch.full_like(y, 10)]), patch_size=2)
            (cond, uncond), variance = both[:, :4].chunk(2), both[:2, 4:]
            eps = uncond + scale * (cond - uncond)
            x = solver.step(torch.cat([eps, variance], 1) if name == "ddpm" else eps, t, x, **random).prev_sample
    ours = Sampler(model, name, schedule=constant(num_steps), cfg_scale=scale)(y, generator=seeded())
    assert torch.equal(ours, x)


def test_equals_the_project_s_own_ddpm_chain():
    """The chain of the MMD loss, in float64, fed the same noise."""
    process = GaussianDiffusion().respaced(12)
    model = GaussianDenoiser(0.7, list(process.timestep_map[::-1]))
    ours = Sampler(model, schedule=constant(12))(torch.tensor([3]), generator=seeded(5))
    own = seeded(torch.randint(2**63 - 1, (1,), generator=seeded(5)).item())
    x = torch.randn(1, 4, 8, 8, generator=own)
    for index in reversed(range(12)):
        output = model(x, process.model_timesteps(torch.tensor([index])), torch.tensor([3]), patch_size=POWERFUL)
        noise = torch.randn(1, 4, 8, 8, generator=own) if index else torch.zeros_like(x)
        x = process.ddpm_step(output.double(), x.double(), torch.tensor([index]), noise).float()
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)  # diffusers' tables are float32


@pytest.mark.parametrize(("recipe", "tolerance"), [("shared", 1e-4), ("lora", 0.0)])
def test_powerful_schedule_of_a_student_gives_the_samples_of_its_target(model, recipe, tolerance):
    student = flexify(model, patch_sizes=[4], recipe=recipe)
    y = torch.tensor([1, 2])
    runs = [Sampler(m, schedule=constant(6), cfg_scale=2.0)(y, generator=seeded()) for m in (model, student)]
    torch.testing.assert_close(*runs, rtol=tolerance, atol=tolerance)


def test_equal_steps_written_differently_give_equal_samples(model):
    student = flexify(model, patch_sizes=[4])
    y = torch.tensor([1, 2])
    schedules = [constant(5), PatchSchedule.parse("2:2,2:3"), PatchSchedule.parse("2:5/2:5")]
    first, *others = [Sampler(student, schedule=s, cfg_scale=2.0)(y, generator=seeded()) for s in schedules]
    assert all(torch.equal(first, other) for other in others)
    weak = Sampler(student, schedule=constant(5, 4), cfg_scale=2.0)(y, generator=seeded())
    assert not torch.allclose(first, weak)


def test_trace_follows_the_schedule():
    model = GaussianDenoiser()
    sampler = Sampler(model, schedule=PatchSchedule.parse("4:2,2:4/4:3,2:3"), cfg_scale=4.0)
    sampler(torch.tensor([1, 2, 3]), generator=seeded())
    branches = [(call.step, call.patch_size, call.branch, call.num_sequences) for call in sampler.trace]
    assert branches == [
        (0, WEAK, "cond+uncond", 6),
        (1, WEAK, "cond+uncond", 6),
        (2, POWERFUL, "cond", 3),
        (2, WEAK, "weak", 3),
        (3, POWERFUL, "cond+uncond", 6),
        (4, POWERFUL, "cond+uncond", 6),
        (5, POWERFUL, "cond+uncond", 6),
    ]
    assert model.num_calls == len(sampler.trace) and sampler.is_guided
    assert [c.timestep for c in sampler.trace if c.branch != "weak"] == make_solver("ddpm", 6).timesteps.tolist()


def test_scale_one_makes_no_guiding_call():
    schedule = PatchSchedule.parse("4:1,2:2/4:2,2:1")
    plain = Sampler(GaussianDenoiser(), schedule=schedule)
    plain(torch.tensor([1]), generator=seeded())
    assert [call.branch for call in plain.trace] == ["cond"] * 3 and not plain.is_guided
    partly = Sampler(GaussianDenoiser(), schedule=schedule, cfg_scale=4.0, weak_guidance_scale=1.0)
    partly(torch.tensor([1]), generator=seeded())
    assert [call.branch for call in partly.trace] == ["cond+uncond", "cond", "cond+uncond"]


def test_unguided_sampling_needs_neither_null_condition_nor_the_guiding_size():
    class Powerful(GaussianDenoiser):
        patch_sizes = (POWERFUL,)

        def null_condition(self, y):
            raise ValueError("no null label")

    Sampler(Powerful(), schedule=PatchSchedule.parse("2:3/4:3"))(torch.tensor([1]), generator=seeded())


def test_trace_is_reset_and_counts_padding():
    sampler = Sampler(GaussianDenoiser(), schedule=constant(2))
    for _ in range(2):
        samples = sampler(torch.arange(5), generator=seeded(), batch_size=3)
    assert [call.num_sequences for call in sampler.trace] == [3, 3, 3, 3] and len(samples) == 5
    assert sampler.trace[0] == Call(0, 999, POWERFUL, "cond", 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_do_not_depend_on_the_batch_split(solver):
    sampler = Sampler(GaussianDenoiser(), solver, schedule=constant(8), cfg_scale=2.0)
    y = torch.arange(8)
    together = sampler(y, generator=seeded())
    generator = seeded()
    in_two_calls = torch.cat([sampler(y[:4], generator=generator), sampler(y[4:], generator=generator)])
    assert torch.equal(together, in_two_calls)
    for batch_size in (1, 3, 8, 20):
        assert torch.equal(together, sampler(y, generator=seeded(), batch_size=batch_size))


def test_batch_split_of_a_real_model(model):
    sampler = Sampler(model, schedule=constant(4), cfg_scale=2.0)
    y = torch.arange(5)
    torch.testing.assert_close(
        sampler(y, generator=seeded()), sampler(y, generator=seeded(), batch_size=2), rtol=1e-4, atol=1e-4
    )


def test_given_noise_replaces_the_drawn_one_and_nothing_else():
    sampler = Sampler(GaussianDenoiser(), schedule=constant(5))
    seeds = torch.randint(2**63 - 1, (3,), generator=seeded()).tolist()
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=seeded(seed)) for seed in seeds])
    before, y = noise.clone(), torch.arange(3)
    for batch_size in (None, 2):
        given = sampler(y, generator=seeded(), noise=noise, batch_size=batch_size)
        assert torch.equal(given, sampler(y, generator=seeded()))
    assert torch.equal(noise, before)


def test_deterministic_solver_is_a_function_of_the_noise():
    sampler, noise = Sampler(GaussianDenoiser(), "ddim", schedule=constant(5)), torch.ones(2, 4, 8, 8)
    assert torch.equal(sampler([1, 2], noise=noise), sampler([1, 2], noise=noise))


def test_global_generator_is_used_only_without_one():
    sampler = Sampler(GaussianDenoiser(), "sa", schedule=constant(5))
    state = torch.random.get_rng_state()
    sampler([1, 2], generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(sampler([1, 2]), sampler([1, 2]))


def test_mode_of_every_submodule_is_restored(model):
    model.train()
    model.t_embedder.eval()  # a frozen part
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []
    model.blocks[0].register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    Sampler(model, schedule=constant(2))([1], generator=seeded())
    assert set(seen) == {(False, False)}
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_mode_is_restored_after_an_error(model):
    def stop(step, x):
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        Sampler(model, schedule=constant(2))([1], generator=seeded(), on_step=stop)
    assert model.training and model.blocks[0].training


def test_on_step_sees_each_state_without_padding():
    sampler, states = Sampler(GaussianDenoiser(), schedule=constant(3)), []
    samples = sampler([1, 2], generator=seeded(), batch_size=4, on_step=lambda step, x: states.append((step, x)))
    assert [(step, len(x)) for step, x in states] == [(0, 2), (1, 2), (2, 2)]
    assert torch.equal(states[-1][1], samples)


def test_size_of_the_latents(model):
    sampler = Sampler(model, schedule=constant(2))
    assert sampler([1], generator=seeded()).shape == (1, 4, 8, 8)
    assert sampler([1], generator=seeded(), size=(6, 12)).shape == (1, 4, 6, 12)
    assert sampler([1], noise=torch.zeros(1, 4, 6, 12)).shape == (1, 4, 6, 12)
    assert sampler([], generator=seeded()).shape == (0, 4, 8, 8)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_solver_works_in_float32_whatever_the_model_computes_in(model, autocast):
    sampler = Sampler(model if autocast else model.to(torch.bfloat16), schedule=constant(3), autocast=autocast)
    samples = sampler([1, 2], generator=seeded())
    assert samples.dtype == torch.float32
    full = Sampler(model.float(), schedule=constant(3))([1, 2], generator=seeded())
    assert 0 < (samples - full).norm() < 0.01 * full.norm()


def test_progress_bar_counts_every_step(capsys):
    Sampler(GaussianDenoiser(), schedule=constant(3), progress=True)([1, 2, 3], generator=seeded(), batch_size=2)
    assert "100%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "call", "sentence"),
    [
        ({"schedule": constant(3, 8)}, {}, "uses patch size 1x8x8, but the model has 1x2x2, 1x4x4"),
        ({"schedule": constant(3), "guidance_channels": 5}, {}, "between 1 and 4"),
        ({"schedule": constant(3), "solver": "ode"}, {}, "unknown solver"),
        ({"schedule": constant(3)}, {"noise": torch.zeros(2, 4, 8, 8)}, "must have shape \\(1, 4, 8, 8\\)"),
        ({"schedule": constant(3)}, {"noise": torch.zeros(1, 4, 8, 8), "size": (4, 4)}, "must have shape"),
        ({"schedule": constant(3)}, {"batch_size": 0}, "at least 1"),
    ],
)
def test_refusals(options, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampler(GaussianDenoiser(), **options)([1], **call)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_never_waits_for_the_device(model, solver):
    sampler = Sampler(model.cuda(), solver, schedule=constant(6), cfg_scale=2.0)
    sampler([1, 2], generator=seeded())
    modes = iter(["error"] + [None] * 4 + ["default"])  # from the end of the first step to that of the last

    def switch(step: int, x: Tensor) -> None:
        mode = next(modes)
        if mode is not None:
            torch.cuda.set_sync_debug_mode(mode)

    try:
        sampler([1, 2], generator=seeded(), on_step=switch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
