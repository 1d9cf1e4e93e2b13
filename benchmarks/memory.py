"""Memory of training per GPU, computed from the shipped configs: no GPU and no weights are needed.

    python benchmarks/memory.py
    python benchmarks/memory.py configs/text_to_video/wan_14b.yaml --gpus 8 --gather float32 --batch-size 2

Weights, what trains with moments, average and gradients are counted tensor by tensor. Sharded (FSDP2; HSDP: the GPUs
of a group), each GPU holds its part of them, and beside that, whole, the block in use, the next one, and what is
outside of blocks; "1" is DDP or a single GPU. Activations are what lives at the height of a step with bf16-mixed
(teacher, student and backward, of the patch size that needs most), counted while the model runs on tensors without
data. Not counted: the chain of the matching loss (half a batch more for each step that carries gradients), work space
of kernels, the allocator's gaps, collectives' buffers and CUDA itself; take a third more (``memory_on_gpu.py``).
"""

from __future__ import annotations

import argparse
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from flexidit import create_model, flexify
from flexidit.conditions import Captions
from flexidit.config import CaptionedConfig
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize

GIB = 2**30
_FLOAT32 = 4
_GATHERED = {"float32": 4, "bfloat16": 2}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS = (
    "imagenet/class_conditional_xl2",
    "text_to_image/pixart_256",
    "text_to_video/wan_1_3b",
    "text_to_video/wan_14b",
    "text_to_video/video_dit_4_9b",
)


@dataclass(frozen=True)
class Setting:
    """What of a recipe decides its memory."""

    variant: str
    weak: tuple[str, ...]
    rank: int | None = None
    """Of adapters on a frozen base; None: all weights train (recipe "shared")."""
    checkpointing: bool = True
    gather: str = "bfloat16"
    """Type that sharded blocks are gathered in."""
    batch_size: int = 1
    """Of one GPU."""
    size: tuple[int, ...] | None = None
    """Latent size; None: the variant's own."""

    @classmethod
    def read(cls, path: Path) -> Setting:
        """Of a config of ``configs/`` that flexifies a variant."""
        config = yaml.safe_load(path.read_text())
        model = config["model"]["init_args"]
        flex, size = model["flex"], model["target"].get("overrides", {}).get("input_size")
        return cls(
            model["target"]["variant"],
            tuple(map(str, flex["patch_sizes"])),
            flex.get("rank", 32) if flex.get("recipe") == "lora" else None,
            model.get("gradient_checkpointing", False),
            model.get("gather_dtype", "float32"),
            config["data"]["init_args"]["batch_size"],
            None if size is None else (size, size) if isinstance(size, int) else tuple(size),
        )

    def student(self) -> FlexiTransformer:
        """On the meta device."""
        overrides = {} if self.size is None else {"input_size": self.size}
        with torch.device("meta"):
            target = create_model(self.variant, **overrides)
            if self.rank is None:
                return flexify(target, list(self.weak))
            return flexify(target, list(self.weak), "lora", rank=self.rank)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    """The frozen base's part."""
    gathered: float
    """Where it is sharded, two blocks and what is outside of blocks. Unless blocks are gathered in bfloat16, autocast's
    copies in bfloat16 too: of what trains until the end of forward, and of all that backward needs of blocks that are
    not checkpointed."""
    trained: float
    """What trains: weights, gradients, two moments and the average, float32."""
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gathered + self.trained + self.activations


def memory_of(setting: Setting, num_gpus: int) -> Memory:
    """What one GPU holds at the height of a step, of weights sharded over so many."""
    student = setting.student()
    trained = [p for p in student.parameters() if p.requires_grad]
    frozen = [p for p in student.parameters() if not p.requires_grad]
    blocks = [_count(block.parameters()) for block in student.blocks]
    outside = _count(student.parameters()) - sum(blocks)
    gathered = 2 * max(blocks) * _GATHERED[setting.gather] + outside * _FLOAT32
    kept = (p for p in student.blocks.parameters() if p.requires_grad or not setting.checkpointing)
    copies = 2 * _count(kept) if num_gpus == 1 or setting.gather == "float32" else 0
    return Memory(
        weights=_count(frozen) * _FLOAT32 / num_gpus,
        gathered=copies + (gathered if num_gpus > 1 else 0),
        trained=_count(trained) * 5 * _FLOAT32 / num_gpus,
        activations=setting.batch_size * activations_of(replace(setting, batch_size=1, gather="")),
    )


@cache
def activations_of(setting: Setting) -> int:
    """Bytes of a step with one sample, at its height, of the patch size that needs most."""
    student = setting.student()
    for linear in [module for module in student.blocks.modules() if isinstance(module, nn.Linear)]:
        linear.to(torch.bfloat16)  # as gathered, or as autocast has them: no copies that are not activations
    sizes = student.patch_sizes if setting.rank is None else student.patch_sizes[1:]
    with FakeTensorMode(allow_non_fake_inputs=True):
        student.to_empty(device="cpu")
        student.gradient_checkpointing = setting.checkpointing
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        return max(height_of_a_step(student, patch_size) for patch_size in sizes)


def height_of_a_step(student: FlexiTransformer, patch_size: PatchSize) -> int:
    """Bytes of all tensors that live at once, beside weights and their gradients."""
    config: Any = student.config
    y: Any = torch.zeros(1, dtype=torch.long)
    if isinstance(config, CaptionedConfig):
        shape = (1, config.caption_length)
        y = Captions(torch.randn(*shape, config.caption_channels), torch.ones(shape, dtype=torch.bool))
    x, t = torch.randn(1, config.in_channels, *config.input_size), torch.full((1,), 500.0)
    kept = [tensor for p in student.parameters() for tensor in (p, p.grad) if tensor is not None]
    with LiveBytes([*kept, *student.buffers()]) as live, torch.autocast("cpu", torch.bfloat16):
        loss = _distilled if config.flex.recipe == "lora" else _squared
        loss(student, x, t, y, patch_size).backward()
    return live.peak


def _distilled(student: FlexiTransformer, x: Tensor, t: Tensor, y: Any, patch_size: PatchSize) -> Tensor:
    with torch.no_grad():
        target = student(x, t, y, patch_size=student.base_patch_size)
    return F.mse_loss(student(x, t, y, patch_size=patch_size).float(), target.float())


def _squared(student: FlexiTransformer, x: Tensor, t: Tensor, y: Any, patch_size: PatchSize) -> Tensor:
    output = student(x, t, y, patch_size=patch_size).float()
    return F.mse_loss(output, torch.zeros_like(output))


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


def table(settings: Mapping[str, Setting], gpus: Sequence[int]) -> str:
    """One line a recipe and number of GPUs, in GiB."""
    names = ("weights", "gathered", "trained", "activations", "total")
    lines = [f"{'recipe':<24} {'batch':>5} {'GPUs':>4} " + " ".join(f"{name:>11}" for name in names)]
    for recipe, setting in settings.items():
        for num_gpus in gpus:
            memory = memory_of(setting, num_gpus)
            values = " ".join(f"{getattr(memory, name) / GIB:>11.1f}" for name in names)
            lines.append(f"{recipe:<24} {setting.batch_size:>5} {num_gpus:>4} {values}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=[CONFIGS / f"{name}.yaml" for name in DEFAULTS])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16], help="that weights are sharded over")
    parser.add_argument("--gather", choices=_GATHERED, help="instead of the config's")
    parser.add_argument("--batch-size", type=int, help="of one GPU, instead of the config's")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", ".*Already found a `peft_config` attribute.*")
    given = {"gather": args.gather, "batch_size": args.batch_size}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    print("GiB a GPU at the height of a step; batch: of one GPU")
    print(table({path.stem: replace(Setting.read(path), **changes) for path in args.configs}, args.gpus))


if __name__ == "__main__":
    main()
