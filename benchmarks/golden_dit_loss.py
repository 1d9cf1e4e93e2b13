"""Golden numbers of DiT's diffusion code, for tests/flexidit/diffusion.

    git clone https://github.com/facebookresearch/DiT
    python benchmarks/golden_dit_loss.py --dit DiT --out tests/flexidit/diffusion/golden_dit_loss.json

Needs a few seconds on a CPU. Inputs come from closed formulas (``golden_inputs``), so that no version of a random
number generator matters; the numbers, and nothing else, are kept. DiT casts its tables to float32 also for float64
inputs: agreement beyond 1e-6 cannot be expected.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPE = (8, 2, 2, 3)
TIMES = (0, 1, 2, 37, 250, 500, 803, 999)
RESPACED = (250, 50, 23)  # at 23 steps accumulated rounding differs from that of linspace


def golden_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """``sin`` of ramps, computed in float64: model output (8, 4, 2, 3), x_start, noise (8, 2, 2, 3) and t (8,).

    ``x_start`` reaches beyond +-1, so that the open bins of the discretised likelihood are visited.
    """
    count = math.prod(SHAPE)
    ramp = torch.arange(2 * count, dtype=torch.float64)
    x_start = 1.05 * torch.sin(0.7 * ramp[:count] + 0.3).view(SHAPE)
    noise = 1.4 * torch.sin(1.3 * ramp[:count] + 1.1).view(SHAPE)
    output = torch.sin(2.1 * ramp + 0.5).view(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:])
    output[:, : SHAPE[1]] = noise + 0.1 * output[:, : SHAPE[1]]  # a model that is nearly right
    tensors = {"model_output": output.to(dtype), "x_start": x_start.to(dtype), "noise": noise.to(dtype)}
    return {**tensors, "t": torch.tensor(TIMES)}


def respaced_times(num_steps: int) -> Tensor:
    """Step indices (8,) at which the respaced processes are compared: both ends and six between."""
    return torch.tensor([round(index * (num_steps - 1) / 7) for index in range(8)])


def loss_numbers(create_diffusion: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Per-sample terms of DiT's training loss, and the norms of its gradient in the noise and the variance channels."""
    x = golden_inputs(dtype)
    output = x["model_output"].requires_grad_()
    diffusion = create_diffusion(timestep_respacing="")
    terms = diffusion.training_losses(lambda *_: output, x["x_start"], x["t"], noise=x["noise"])
    terms["loss"].sum().backward()
    assert output.grad is not None
    numbers = {name: terms[name] for name in ("loss", "mse", "vb")}
    for name, grad in zip(("grad_eps", "grad_variance"), output.grad.chunk(2, dim=1), strict=True):
        numbers[name] = grad.flatten(1).norm(dim=1)
    return {name: _round(value) for name, value in numbers.items()}


def step_numbers(create_diffusion: Any, num_steps: int) -> dict[str, Any]:
    """Timesteps, reverse step and forward noising of a respaced process, in float64."""
    x, t = golden_inputs(torch.float64), respaced_times(num_steps)
    diffusion = create_diffusion(timestep_respacing=str(num_steps))
    numbers: dict[str, Any] = {"timestep_map": diffusion.timestep_map}
    x_t = diffusion.q_sample(x["x_start"], t, noise=x["noise"])
    numbers["q_sample"] = _round(x_t)
    p = diffusion.p_mean_variance(lambda *_: x["model_output"], x_t, t, clip_denoised=False)
    numbers.update({name: _round(p[name]) for name in ("mean", "log_variance", "pred_xstart")})
    for name, is_small in (("small", True), ("large", False)):
        fixed = create_diffusion(timestep_respacing=str(num_steps), learn_sigma=False, sigma_small=is_small)
        eps = x["model_output"].chunk(2, dim=1)[0]
        p = fixed.p_mean_variance(lambda *_, eps=eps: eps, x_t, t, clip_denoised=False)
        numbers[f"log_variance_{name}"] = _round(p["log_variance"][:, 0, 0, 0])
    return numbers


def golden_numbers(checkout: Path) -> dict[str, Any]:
    """Everything the tests compare with, computed by the ``diffusion`` package in a DiT checkout."""
    sys.path.insert(0, str(checkout))
    from diffusion import create_diffusion  # type: ignore[import-not-found]

    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "source": "https://github.com/facebookresearch/DiT, package diffusion",
        "commit": commit.stdout.strip() or "unknown",
        "how": "benchmarks/golden_dit_loss.py --dit CHECKOUT; inputs: golden_inputs() there",
        "loss": {name: loss_numbers(create_diffusion, getattr(torch, name)) for name in ("float64", "float32")},
        "respaced": {str(num_steps): step_numbers(create_diffusion, num_steps) for num_steps in RESPACED},
    }


def _round(values: Tensor) -> list[float]:
    return [float(f"{value:.10g}") for value in values.detach().double().flatten().tolist()]


def main() -> None:
    """Write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", type=Path, required=True, help="checkout of github.com/facebookresearch/DiT")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if not (arguments.dit / "diffusion" / "gaussian_diffusion.py").is_file():
        parser.error(f"{arguments.dit} has no diffusion/gaussian_diffusion.py; give a checkout of facebookresearch/DiT")
    numbers = golden_numbers(arguments.dit)
    text = re.sub(r"\[[^\[\]]*\]", lambda numbers: " ".join(numbers.group().split()), json.dumps(numbers, indent=1))
    arguments.out.write_text(text + "\n")  # one list a line


if __name__ == "__main__":
    main()
