"""FSDP2: which parts of a model are gathered together, in which type, and over which devices they are sharded.

Only rank 0 of a job needs to have the weights: the others give a model on the meta device, and receive their shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flexidit.models import FlexiTransformer

GatherDtype: TypeAlias = Literal["float32", "bfloat16"]


def shard(model: FlexiTransformer, mesh: DeviceMesh, gather_dtype: GatherDtype = "float32") -> None:
    """Shard parameters, gradients and optimizer state, in place: one group a block, one for the rest.

    Comes last: activation checkpointing and the blocks' compilation must be in place. The weights are those of rank 0,
    to the bit; what the model has on other ranks is not looked at.

    The group of a block is freed after each use and gathered again for the next: by the teacher, by the student, and in
    backward. So a device never holds more than a block or two beside its shards, and the two predictions of a step
    share the one frozen base. The rest, small beside the blocks, stays from the teacher's pass to the end of backward.

    Args:
        model: on the CPU, or (not on rank 0) on the meta device; its tensors move to the mesh's device.
        mesh: axes ("data_parallel", "tensor_parallel") of Lightning's ``ModelParallelStrategy``.
        gather_dtype: "float32": as the weights are, so that with ``precision: bf16-mixed`` autocast decides what is
            computed in bfloat16, exactly as it does without sharding. "bfloat16": see :func:`half_precision`.
    """
    weights = _take_out(model)
    mesh = sharding_mesh(mesh)
    for block in model.blocks:
        if gather_dtype == "bfloat16":
            fully_shard(block, mesh=mesh, mp_policy=half_precision(), ignored_params=frozen_vectors(block))
        else:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=mesh.device_type)
    _put_back(model, weights)


def half_precision() -> MixedPrecisionPolicy:
    """Weights of blocks in bfloat16 while they are used: half the traffic and memory of gathering; gradients add up in
    float32, and shards, moments and averages are float32.

    It goes with autocast (``precision: bf16-mixed``), which would round the same weights before it multiplies. Nothing
    else may be rounded: inputs are not cast (the time step 999 would become 1000, positions would collide), the group
    around the blocks (embeddings, positions, time, output) is gathered as it is, and so is what a frozen block has
    beside linear layers, :func:`frozen_vectors`. Where such vectors train, they are rounded for use like the rest.
    """
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )


def frozen_vectors(block: nn.Module) -> set[nn.Parameter]:
    """What a block has beside linear layers and does not train: norms and tables of modulation.

    A ten-thousandth of its weights, for which a copy on each device is cheaper than a group of their own.
    """
    others = (module for module in block.modules() if not isinstance(module, nn.Linear))
    return {p for module in others for p in module.parameters(recurse=False) if not p.requires_grad}


def check_gathering(gather_dtype: str, precision: str, is_sharded: bool) -> None:
    """Refuse what would not work.

    Raises:
        ValueError: an unknown type; half precision of weights without that of their inputs, or of a model that is not
            sharded.
    """
    if gather_dtype not in get_args(GatherDtype):
        raise ValueError(f"gather_dtype is {' or '.join(get_args(GatherDtype))}, got {gather_dtype!r}")
    if gather_dtype == "float32":
        return
    if not is_sharded:
        raise ValueError(
            "gather_dtype bfloat16 is about sharded weights and these are not: add configs/trainer/fsdp.yaml, or set "
            "it to float32"
        )
    if precision != "bf16-mixed":
        raise ValueError(
            f"gather_dtype bfloat16 goes with trainer.precision bf16-mixed, not with {precision}: change one of both"
        )


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


def _take_out(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, derived ones too, which is left without any; on rank 0 they are the weights."""
    tensors = {**model.state_dict(), **_derived(model)}
    model.to("meta")
    return tensors if torch.distributed.get_rank() == 0 else {}


def _put_back(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Rank 0's tensors into a sharded model, one after another, so that no rank holds two of them whole.

    Derived ones are sent too: computed on each device, sines would differ in the last bit from those of one process.
    """
    derived = _derived(model)
    weights: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name not in derived}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    for name, buffer in derived.items():
        if name in tensors:
            buffer.copy_(tensors[name])
        torch.distributed.broadcast(buffer, src=0)


def _derived(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that no checkpoint holds."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}
