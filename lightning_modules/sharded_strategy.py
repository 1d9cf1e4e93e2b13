"""Over which devices a model is sharded, and which of them hold copies of one another: FSDP2 and HSDP."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from flexidit.sharded_files import is_sharded, put_into
from lightning_modules.sharded_saves import in_background, read_rest, write_shards
from lightning_modules.sharding import sharding_mesh


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, whose devices are told by what they share instead of by the size of two axes.

    Args:
        shard_over: "job": each device keeps one part of what all devices of all nodes hold together (FSDP). "node":
            each node holds everything, and gradients are averaged between nodes (HSDP): gathering stays on the fast
            links inside a node, for the memory of as many devices as it has. A number: groups of so many consecutive
            ranks hold everything.
        save_distributed_checkpoint: a folder that each rank writes its part of, for models that no host can hold;
            false: one file that everything can read, gathered on rank 0.
        process_group_backend: null: NCCL on GPUs, gloo on CPUs.
        timeout: what a collective may take before the job is ended, as "h:mm:ss".

    Raises:
        ValueError: ``shard_over`` is something else.
    """

    def __init__(
        self,
        shard_over: Literal["job", "node"] | int = "job",
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        if shard_over not in ("job", "node") and not (isinstance(shard_over, int) and shard_over >= 1):
            raise ValueError(f"shard_over is job, node or a number of devices, got {shard_over!r}")
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.shard_over = shard_over

    def setup_environment(self) -> None:
        """Start the processes' group; only now their number is known.

        Raises:
            ValueError: it is not divisible by that of the devices that share a copy.
        """
        world_size = self.num_nodes * self.num_processes
        named = {"job": world_size, "node": self.num_processes}
        sharing = self.shard_over if isinstance(self.shard_over, int) else named[self.shard_over]
        if world_size % sharing:
            raise ValueError(f"{world_size} devices cannot be divided into groups of shard_over: {sharing}")
        self._data_parallel_size, self._tensor_parallel_size = world_size // sharing, sharing
        super().setup_environment()
        assert self._timeout is not None
        for axis in ("data_parallel", "tensor_parallel"):
            # The mesh's own groups would have torch's default: gathering would wait longer than was asked for.
            _set_timeout(self._timeout, self.device_mesh.get_group(axis))

    @property
    def saves_shards(self) -> bool:
        """Whether callbacks may leave sharded tensors in a checkpoint: each rank writes, and reads, its part."""
        return self._save_distributed_checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Lightning's, which would write sharded tensors of callbacks where other ranks' parts are missing."""
        if not self.saves_shards or storage_options is not None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        else:
            write_shards(checkpoint, Path(self.broadcast(filepath)), self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's, and the sharded tensors of callbacks."""
        path = Path(self.broadcast(checkpoint_path))
        loaded = super().load_checkpoint(path, weights_only)
        if is_sharded(path):
            put_into(loaded, read_rest(path, sharding_mesh(self.device_mesh)))
        return loaded

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards for a checkpoint; on the device, if what writes in the background is to copy them.

        Lightning would copy them first, to memory that is new each time and through which a GPU copies slowly.
        """
        if not in_background(self):
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same for the state of an optimizer."""
        if not in_background(self):
            return super().optimizer_state(optimizer)
        assert self.model is not None
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return dict(get_optimizer_state_dict(self.model, own))

    def teardown(self) -> None:
        """Lightning's, and the end of what is still being written, which it forgets here."""
        super().teardown()
        self.checkpoint_io.teardown()


def _set_timeout(timeout: timedelta, group: torch.distributed.ProcessGroup) -> None:
    public = getattr(torch.distributed, "set_timeout", None)  # not in every torch that works here
    (public or torch.distributed.distributed_c10d._set_pg_timeout)(timeout, group)
