"""Two processes with half a batch each must train as one process does with the whole batch.

Run as a script, this file is the worker: ``RANK WORLD_SIZE FOLDER``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.diffusion.mmd import ChainPlan, bootstrapped_mmd_loss, gather_across_ranks, rbf_mmd

GLOBAL_BATCH = 12


def model() -> nn.Linear:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.sin(torch.arange(9.0)).view(3, 3))
        layer.bias.zero_()
    return layer


def batch() -> tuple[Tensor, Tensor]:
    ramp = torch.arange(GLOBAL_BATCH * 3, dtype=torch.float64).view(-1, 3)
    return torch.sin(ramp), torch.cos(1.7 * ramp)


def losses(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """MMD of the gathered samples, and an ordinary mean over the samples at hand."""
    out = layer(x)
    return rbf_mmd(gather_across_ranks(out), gather_across_ranks(y)), out.square().mean()


def worker(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    x, y = (half.chunk(world_size)[rank] for half in batch())
    layer = nn.parallel.DistributedDataParallel(model())
    matching, plain = losses(layer, x, y)
    (matching + plain).backward()
    diffusion = GaussianDiffusion().respaced(50)
    chained = bootstrapped_mmd_loss(
        lambda x_t, t, labels, size: layer.module(x_t),
        diffusion,
        x,
        y,
        torch.zeros(len(x)),
        plan=ChainPlan.from_steps({4: 1, 2: 1}),
        times=(5, 7),
        generator=torch.Generator().manual_seed(rank),  # noise differs between ranks; the loss must not
    )
    result = {
        "order": gather_across_ranks(torch.full((2,), float(rank))),
        "matching": matching.detach(),
        "chained": chained.detach(),
        **{name: parameter.grad for name, parameter in layer.module.named_parameters()},
    }
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), "2", str(folder)], env=environment) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_gradient_after_averaging_is_that_of_the_global_batch(ranks: list[dict[str, Tensor]]) -> None:
    layer = model()
    matching, plain = losses(layer, *batch())
    (matching + plain).backward()
    for result in ranks:
        torch.testing.assert_close(result["matching"], matching.detach(), rtol=1e-12, atol=1e-14)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(result[name], parameter.grad, rtol=1e-10, atol=1e-14)


def test_ranks_agree_on_loss_and_order(ranks: list[dict[str, Tensor]]) -> None:
    assert ranks[0]["order"].tolist() == ranks[1]["order"].tolist() == [0, 0, 1, 1]
    assert torch.equal(ranks[0]["chained"], ranks[1]["chained"])


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
