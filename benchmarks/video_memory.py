"""Memory of distilling a text-to-video model, per GPU, computed from its config: no GPU and no weights are needed.

    python benchmarks/video_memory.py
    python benchmarks/video_memory.py --models Wan-14B --gpus 8 --gather float32 --batch-size 2

Weights, adapters with moments, average and gradients are counted tensor by tensor. With FSDP2 (several GPUs) each holds
its part of them, and beside that, whole, the block in use, the next one, and what is outside of blocks. Activations are
those of the mode that needs most, with gradient checkpointing and bf16-mixed: one float32 input a block, and what one
block keeps for its backward pass, which is read off the block itself, run on tensors without data. Not counted: work
space of kernels, the allocator's gaps, collectives' buffers and CUDA itself; take a fifth more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from flexidit import create_model, flexify
from flexidit.conditions import Captions
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize

GIB = 2**30
_FLOAT32 = 4
_GATHERED = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    """The frozen base's part."""
    gathered: float
    """Two blocks and what is outside of blocks; 0 on a single GPU, where nothing is gathered."""
    trained: float
    """Adapters, (de)embeddings and vectors: weights, gradients, two moments and the average, float32."""
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gathered + self.trained + self.activations


def memory_of(
    name: str,
    num_gpus: int,
    *,
    weak: Sequence[str] = ("1x4x4", "2x2x2"),
    rank: int = 64,
    gather: str = "bfloat16",
    batch_size: int = 1,
    size: tuple[int, ...] | None = None,
) -> Memory:
    """What one GPU holds at the height of a step.

    Args:
        name: a variant of clips.
        num_gpus: that the weights are sharded over.
        weak: patch sizes that train.
        rank: of their adapters.
        gather: type that sharded blocks are gathered in.
        batch_size: of one GPU.
        size: latent size; None: the variant's own.
    """
    overrides = {} if size is None else {"input_size": size}
    with torch.device("meta"):
        student = flexify(create_model(name, **overrides), weak, "lora", rank=rank)
    trained = [p for p in student.parameters() if p.requires_grad]
    frozen = [p for p in student.parameters() if not p.requires_grad]
    blocks = [_count(block.parameters()) for block in student.blocks]
    outside = _count(student.parameters()) - sum(blocks)
    gathered = 2 * max(blocks) * _GATHERED[gather] + outside * _FLOAT32
    return Memory(
        weights=_count(frozen) * _FLOAT32 / num_gpus,
        gathered=gathered if num_gpus > 1 else 0,
        trained=_count(trained) * 5 * _FLOAT32 / num_gpus,
        activations=batch_size * activations_of(name, weak, rank, student.config.depth, overrides),
    )


def activations_of(name: str, weak: Sequence[str], rank: int, depth: int, overrides: dict[str, Any]) -> float:
    """Bytes of one sample: of the weak mode with most tokens, or of the teacher in a single block if that is more.

    The teacher's block frees as it goes what the student's must keep, so that counting it as kept is an upper bound.
    """
    with torch.device("meta"):
        model = flexify(create_model(name, **overrides, depth=1), weak, "lora", rank=rank)
    for linear in [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]:
        linear.to(torch.bfloat16)  # as gathered, or as autocast has them: no copies that are not activations
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        one_block = {patch_size: _kept(model, patch_size) for patch_size in model.patch_sizes}
    width, latent = model.config.hidden_size, model.config.input_size
    inputs = {patch_size: _FLOAT32 * patch_size.num_tokens(latent) * width for patch_size in model.patch_sizes}
    base, *others = model.patch_sizes
    student = max(one_block[patch_size] + (depth - 1) * inputs[patch_size] for patch_size in others)
    return max(student, one_block[base])


def _kept(model: FlexiTransformer, patch_size: PatchSize) -> int:
    """Bytes that a model of one block keeps for its backward pass, beside its parameters."""
    config: Any = model.config
    x = torch.randn(1, config.in_channels, *config.input_size)
    shape = (1, config.caption_length)
    y = Captions(torch.randn(*shape, config.caption_channels), torch.ones(shape, dtype=torch.bool))
    own = {_storage(p) for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's number would be given to another

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    first = model.embedding.weights(model.base_patch_size)[0]
    first.requires_grad_(patch_size == model.base_patch_size)  # where nothing trains, nothing would be kept
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, torch.full((1,), 500.0), y, patch_size=patch_size)
    return sum(kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def table(models: Sequence[str], gpus: Sequence[int], gather: str, batch_size: int) -> str:
    """One line a model and number of GPUs, in GiB."""
    names = ("weights", "gathered", "trained", "activations", "total")
    lines = [f"{'model':<14} {'GPUs':>4} " + " ".join(f"{name:>11}" for name in names)]
    for model in models:
        for num_gpus in gpus:
            memory = memory_of(model, num_gpus, gather=gather, batch_size=batch_size)
            values = (getattr(memory, name) / GIB for name in names)
            lines.append(f"{model:<14} {num_gpus:>4} " + " ".join(f"{value:>11.1f}" for value in values))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["VideoDiT-4.9B", "Wan-1.3B", "Wan-14B"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--gather", choices=_GATHERED, default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=1, help="of one GPU")
    args = parser.parse_args(arguments)
    print(f"modes 1x4x4 and 2x2x2, rank 64, {args.batch_size} clip a GPU, gathered in {args.gather}; GiB a GPU")
    print(table(args.models, args.gpus, args.gather, args.batch_size))


if __name__ == "__main__":
    main()
