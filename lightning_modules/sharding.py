"""FSDP2: which parts of a model are gathered together, and over which devices they are sharded."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from flexidit.models import FlexiTransformer


def shard(model: FlexiTransformer, mesh: DeviceMesh) -> None:
    """Shard parameters, gradients and optimizer state, in place: one group a block, one for the rest.

    Comes last: activation checkpointing and the blocks' compilation must be in place. No mixed-precision policy: with
    ``precision: bf16-mixed`` autocast decides what is computed in bfloat16, exactly as it does without sharding.

    Args:
        model: on any device; its tensors move to the mesh's.
        mesh: axes ("data_parallel", "tensor_parallel") of Lightning's ``ModelParallelStrategy``.
    """
    mesh = sharding_mesh(mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW its moments now, at zero and step 0, where it would make them at a parameter's first gradient.

    A sharded checkpoint is loaded into the state of every parameter. For those that have none yet, as of a patch size
    that was not drawn so far, PyTorch makes one up by a step: they would go on from step 1, and differ from the run
    that was never interrupted.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group.get("fused") else "cpu"  # where AdamW itself has the counter
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes that ``fully_shard`` gets: one to shard over, or (replicate over, shard over).

    No tensor is computed in parts, so the strategy's second axis is free. With the sizes "auto" the axes are (nodes,
    devices of a node): weights are sharded inside each node, where links are fast, and replicated over nodes. With
    ``tensor_parallel_size: 1`` they are sharded over all devices of all nodes.
    """
    nodes, devices = mesh["data_parallel"], mesh["tensor_parallel"]
    if devices.size() == 1:
        return nodes
    return devices if nodes.size() == 1 else mesh
