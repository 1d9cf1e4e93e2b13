"""Memory of distilling a text-to-video model, per GPU, computed from its config: no GPU and no weights are needed.

    python benchmarks/video_memory.py
    python benchmarks/video_memory.py --models Wan-14B --gpus 8 --gather float32 --batch-size 2

Weights, adapters with moments, average and gradients are counted tensor by tensor. With FSDP2 (several GPUs) each holds
its part of them, and beside that, whole, the block in use, the next one, and what is outside of blocks. Activations are
what lives at the height of a step (teacher, student and backward, with gradient checkpointing and bf16-mixed, of the
mode that needs most), counted while the model itself runs on tensors without data (a minute). Not counted:
work space of kernels, the allocator's gaps, collectives' buffers and CUDA itself; take a fifth more.
"""

from __future__ import annotations

import argparse
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

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
    student = student_of(name, weak, rank, size)
    trained = [p for p in student.parameters() if p.requires_grad]
    frozen = [p for p in student.parameters() if not p.requires_grad]
    blocks = [_count(block.parameters()) for block in student.blocks]
    outside = _count(student.parameters()) - sum(blocks)
    gathered = 2 * max(blocks) * _GATHERED[gather] + outside * _FLOAT32
    return Memory(
        weights=_count(frozen) * _FLOAT32 / num_gpus,
        gathered=gathered if num_gpus > 1 else 0,
        trained=_count(trained) * 5 * _FLOAT32 / num_gpus,
        activations=batch_size * activations_of(name, tuple(weak), rank, size),
    )


@cache
def activations_of(name: str, weak: tuple[str, ...], rank: int, size: tuple[int, ...] | None = None) -> int:
    """Bytes of a step with one clip, at its height: teacher, student and backward of the mode that needs most."""
    student = student_of(name, weak, rank, size)
    for linear in [module for module in student.blocks.modules() if isinstance(module, nn.Linear)]:
        linear.to(torch.bfloat16)  # as gathered, or as autocast has them: no copies that are not activations
    with FakeTensorMode(allow_non_fake_inputs=True):
        student.to_empty(device="cpu")
        student.gradient_checkpointing = True
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        return max(height_of_a_step(student, patch_size) for patch_size in student.patch_sizes[1:])


def student_of(name: str, weak: Sequence[str], rank: int, size: tuple[int, ...] | None) -> FlexiTransformer:
    """On the meta device."""
    overrides = {} if size is None else {"input_size": size}
    with torch.device("meta"):
        return flexify(create_model(name, **overrides), weak, "lora", rank=rank)


def height_of_a_step(student: FlexiTransformer, patch_size: PatchSize) -> int:
    """Bytes of all tensors that live at once, beside weights and their gradients."""
    config: Any = student.config
    shape = (1, config.caption_length)
    y = Captions(torch.randn(*shape, config.caption_channels), torch.ones(shape, dtype=torch.bool))
    x, t = torch.randn(1, config.in_channels, *config.input_size), torch.full((1,), 500.0)
    kept = [tensor for p in student.parameters() for tensor in (p, p.grad) if tensor is not None]
    with LiveBytes([*kept, *student.buffers()]) as live, torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            target = student(x, t, y, patch_size=student.base_patch_size)
        F.mse_loss(student(x, t, y, patch_size=patch_size).float(), target.float()).backward()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations allocate, and remembers the most that lived at once.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._storages: dict[int, weakref.ref[Any] | None] = {id(tensor.untyped_storage()): None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def free(_: Any) -> None:
            del self._storages[key]
            self.live -= num_bytes

        self._storages[key] = weakref.ref(storage, free)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)


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
    warnings.filterwarnings("ignore", ".*Already found a `peft_config` attribute.*")
    print(f"modes 1x4x4 and 2x2x2, rank 64, {args.batch_size} clips a GPU, gathered in {args.gather}; GiB a GPU")
    print(table(args.models, args.gpus, args.gather, args.batch_size))


if __name__ == "__main__":
    main()
