"""Checkpoints that each process of a job writes its part of: folders, whole or not there, at once or in the background.

In the background it is torch's ``async_save`` that writes, from copies that are made before training goes on. Processes
agree on who writes what in its threads, over a group of their own on the CPU: their messages meet none of training's,
and wait for no device. An error of one of them is told to all by the end of the save, so none waits for another.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint import FileSystemWriter, async_save, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, zeros

from flexidit.sharded_files import EXTRA, REST, describe_rest, mark_complete
from lightning_modules.checkpoint_files import abandon, begin, place, writing
from lightning_modules.checkpoint_io import BackgroundCheckpointIO, write_file
from lightning_modules.one_reader import on_rank_zero

_WRITER = "inline_container"


def writes_folders(strategy: Strategy) -> bool:
    """Whether each process writes its shards."""
    return bool(getattr(strategy, "_save_distributed_checkpoint", False))


def in_background(strategy: Strategy) -> bool:
    """Whether they do so while training goes on."""
    return writes_folders(strategy) and isinstance(strategy.checkpoint_io, BackgroundCheckpointIO)


def wait_for_writer(strategy: Strategy) -> OSError | None:
    """Return when what this process writes in the background is on disk; with the error, if it is not."""
    writer = strategy.checkpoint_io
    try:
        if isinstance(writer, BackgroundCheckpointIO):
            writer.wait()
    except OSError as error:
        return error
    return None


def save_folder(strategy: Strategy, write: Callable[..., None], checkpoint: dict[str, Any], path: Path) -> None:
    """Have all ranks write to a folder that gets its name when they are done.

    Raises:
        OSError: on every rank; what was there before is as it was.
    """
    with _as_of(path):
        temporary = on_rank_zero(strategy, lambda: _begin_folder(path, writes_folders(strategy)))
        error: OSError | None = None
        try:
            write(checkpoint, temporary)
            error = wait_for_writer(strategy)
        except CheckpointException as raised:
            error = _first_failure(raised)
        except OSError as raised:
            error = raised
        except RuntimeError as raised:  # of what rank 0 writes beside the shards, by torch's own writer
            if _WRITER not in str(raised):
                raise
            error = OSError("its file cannot be written")
        is_whole = strategy.reduce_boolean_decision(error is None, all=True)
        on_rank_zero(strategy, lambda: _end_folder(path, error, is_whole))


def start_folder(strategy: Strategy, checkpoint: dict[str, Any], path: Path) -> None:
    """Have all ranks copy their parts, and write them while training goes on; the save before must have ended.

    Raises:
        OSError: on every rank, the folder cannot be begun. What happens later is told by the writer's ``wait``.
    """
    writer = strategy.checkpoint_io
    assert isinstance(writer, BackgroundCheckpointIO)
    with _as_of(path):
        temporary = on_rank_zero(strategy, lambda: _begin_folder(path, is_folder=True))
    shards = take_shards(checkpoint)
    shards, rest = writer.copy((shards, checkpoint if strategy.is_global_zero else None))
    if writer.group is None:
        writer.group = torch.distributed.new_group(backend="gloo", timeout=getattr(strategy, "_timeout", None))
    upload = async_save(shards, storage_writer=_CopiedShards(temporary), process_group=writer.group)
    writer.submit(path, partial(_finish_folder, upload, rest, path))  # type: ignore[arg-type]


def write_shards(checkpoint: dict[str, Any], folder: Path, is_first: bool) -> None:
    """Have all ranks write to a folder at once; the first one writes what is not sharded."""
    save(take_shards(checkpoint), checkpoint_id=folder)
    if is_first:
        write_file(checkpoint, folder / EXTRA)


def read_rest(folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """The sharded tensors beside weights and optimizers, where they lie in a checkpoint, sharded as FSDP2 does it.

    No rank reads more than its part.
    """
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    rest = _sharded_like(describe_rest(folder), mesh, placements)
    if rest:
        load({REST: rest}, checkpoint_id=folder)
    return rest


def take_shards(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What ranks write parts of is taken out of a checkpoint; weights and optimizers are named as Lightning does it."""
    shards = {"state_dict": checkpoint.pop("state_dict")}
    shards |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
    rest = _take_sharded(checkpoint)
    return {**shards, REST: rest} if rest else shards


class _CopiedShards(FileSystemWriter):
    """torch's writer of shards that are copies on the host already.

    It copies nothing ahead: that takes a stream, and in a thread it would be one of the node's first GPU.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict


def _finish_folder(upload: Future[Any], rest: dict[str, Any] | None, path: Path) -> None:
    """In a thread, when every process has written its shards: rank 0, which has the rest, gives the folder its name."""
    with _as_of(path):
        try:
            upload.result()
            if rest is not None:
                write_file(rest, writing(path) / EXTRA)
                mark_complete(writing(path))
                place(path)
        except BaseException as error:
            if rest is not None:
                abandon(path)
            raise (_first_failure(error) if isinstance(error, CheckpointException) else error) from None


def _take_sharded(values: dict[str, Any]) -> dict[str, Any]:
    """The sharded tensors of nested dictionaries, which have them no more."""
    taken: dict[str, Any] = {}
    for key, value in [*values.items()]:
        if isinstance(value, DTensor):
            taken[key] = values.pop(key)
        elif isinstance(value, dict) and (inner := _take_sharded(value)):
            taken[key] = inner
    return taken


def _sharded_like(described: dict[str, Any], mesh: DeviceMesh, placements: Sequence[Placement]) -> dict[str, Any]:
    return {
        name: _sharded_like(value, mesh, placements)
        if isinstance(value, dict)
        else zeros(value.shape, dtype=value.dtype, device_mesh=mesh, placements=placements)
        for name, value in described.items()
    }


@contextmanager
def _as_of(path: Path) -> Iterator[None]:
    """Errors name the checkpoint, not a file in the temporary folder, which nobody knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def _begin_folder(path: Path, is_folder: bool) -> Path:
    temporary = begin(path)
    if is_folder:
        temporary.mkdir()
    return temporary


def _end_folder(path: Path, error: OSError | None, is_whole: bool) -> None:
    try:
        if not is_whole:
            raise error or OSError("another process could not write its part")
        if writing(path).is_dir():
            mark_complete(writing(path))
        place(path)
    except BaseException:
        abandon(path)
        raise


def _first_failure(error: CheckpointException) -> OSError:
    """Of any rank; torch's writer has its own words for a file that cannot be written."""
    rank, (raised, _) = min(error.failures.items(), key=lambda item: item[0])
    if isinstance(raised, OSError):
        return raised
    reason = str(raised).splitlines()[0]
    return OSError(f"process {rank}: {'its file cannot be written' if _WRITER in reason else reason}")
