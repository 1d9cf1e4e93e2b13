"""Both processes answer to training alike, and a config says which one it is."""

from __future__ import annotations

import pytest
import torch

from flexidit.config import DiTConfig, TextDiTConfig
from flexidit.diffusion.flow import RectifiedFlow
from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.diffusion.losses import training_loss
from flexidit.diffusion.process import Process, process_of

PROCESSES = [GaussianDiffusion(), RectifiedFlow(), RectifiedFlow(shift=5.0)]


def test_the_process_is_that_of_the_config() -> None:
    assert isinstance(process_of(DiTConfig()), GaussianDiffusion)
    flow = process_of(TextDiTConfig(process="flow", time_shift=3.0, learn_sigma=False))
    assert isinstance(flow, RectifiedFlow) and (flow.shift, flow.num_timesteps) == (3.0, 1000)


def test_a_diffusion_model_is_told_the_step_index_itself() -> None:
    t = torch.arange(1000)
    assert torch.equal(process_of(DiTConfig()).model_timesteps(t), t)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_who_predicts_the_target_knows_the_data_and_has_no_loss(process: Process) -> None:
    x, noise = (torch.randn(4, 2, 3, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 1, process.num_timesteps // 2, process.num_timesteps - 1])
    x_t, target = process.q_sample(x, t, noise), process.target(x, noise)
    torch.testing.assert_close(process.predict_x_start(x_t, t, target), x, rtol=0, atol=1e-11)
    assert not training_loss(process, target, x, x_t, t, noise, learn_sigma=False).total.any()


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_indices_run_from_data_to_noise(process: Process) -> None:
    x, noise, ends = torch.ones(2, 1), -torch.ones(2, 1), torch.tensor([0, process.num_timesteps - 1])
    nearly_data, nearly_noise = process.q_sample(x, ends, noise).flatten().tolist()
    assert nearly_data > 0.9 and nearly_noise < -0.9
    first, last = process.model_timesteps(ends).tolist()
    assert 0 <= first < last <= 1000
