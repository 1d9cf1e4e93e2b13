"""Checkpoints written to disk as they are serialised, at once or while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from flexidit.sharded_files import is_sharded, read_sharded
from lightning_modules.checkpoint_files import abandon, begin, delete, place


class StreamingCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to disk, and gives the file its name only when it is complete.

    Lightning's own assembles the whole file in memory first: for DiT-XL/2 with its average and both moments 11 GB more
    on the host, on top of the 15 GB that training on a CPU takes.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write it.

        Raises:
            OSError: it cannot be written; what was there before is as it was.
        """
        if _is_remote(path):  # an object store, which Lightning writes through fsspec
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            _write(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read it; only what needs no code to be run, whatever Lightning asks for. Of shards each process reads all."""
        if not _is_remote(path) and is_sharded(Path(path)):
            return read_sharded(Path(path), with_optimizers=True)
        return super().load_checkpoint(path, map_location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a file, a link or a folder."""
        if _is_remote(path):
            super().remove_checkpoint(path)
        else:
            delete(Path(path))


class BackgroundCheckpointIO(StreamingCheckpointIO):
    """Writes while training goes on, from a copy of the state that is made before it does.

    Training waits for the copy, and for the save before if that is still being written. The host needs memory for one
    more copy of all that a checkpoint holds, until the end. What Lightning wants removed is removed when the save
    before has ended well: a job killed at any moment leaves the new checkpoint or the old one. After an error old ones
    stay until a save succeeds; the error is raised by the next save, or by :meth:`wait`.

    Checkpoints that SLURM's signal asks for are waited for: the job ends right after.
    """

    def __init__(self) -> None:
        self._snapshots = Snapshots()
        self._executor: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._last_failed = False
        self._spared: list[Path] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Copy it, and have it written.

        Raises:
            OSError: the one before could not be written; this one is being.
        """
        error = self._settle()
        self._submit(self._save, self._snapshots.take(checkpoint), path, storage_options)
        if Path(path).name.startswith("hpc_ckpt_"):
            error = self._settle() or error
        if error is not None:
            raise error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete it after the saves that were asked for before, unless the last of them failed."""
        self._submit(self._remove, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read it, once all is written."""
        self.wait()
        return super().load_checkpoint(path, map_location, weights_only)

    def wait(self) -> None:
        """Return when all is on disk.

        Raises:
            OSError: some is not.
        """
        error = self._settle()
        if error is not None:
            raise error

    def teardown(self) -> None:
        """End what was begun, and the thread; here an error is only warned of, so that it hides none before it."""
        error = self._settle()
        if error is not None:
            rank_zero_warn(f"a checkpoint could not be saved: {error}")
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _submit(self, task: Callable[..., None], *args: Any) -> None:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending.append(self._executor.submit(task, *args))

    def _settle(self) -> BaseException | None:
        """Wait; the first error, which is told once."""
        errors = [future.exception() for future in self._pending]
        self._pending = []
        return next((error for error in errors if error is not None), None)

    def _save(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None) -> None:
        self._last_failed = True
        super().save_checkpoint(checkpoint, path, storage_options)
        self._last_failed = False
        while self._spared:
            super().remove_checkpoint(self._spared.pop())

    def _remove(self, path: str | Path) -> None:
        if self._last_failed:
            self._spared.append(Path(path))
        else:
            super().remove_checkpoint(path)


class Snapshots:
    """Copies of a state on the host, each in the memory of the one before: new memory takes five times as long."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._copies: dict[int, Tensor] = {}
        self._num_used = 0

    def take(self, state: Any) -> Any:
        """All its containers and tensors; a tensor that is there twice is copied once. The copy before is lost."""
        self._copies, self._num_used = {}, 0
        copied = self._copy(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._copies:
                self._copies[id(value)] = self._next_buffer(value).copy_(value.detach(), non_blocking=True)
            return self._copies[id(value)]
        if isinstance(value, dict):
            copied = copy(value)  # a state dict is an OrderedDict with an attribute
            copied.update({key: self._copy(item) for key, item in value.items()})
            return copied
        if isinstance(value, (list, tuple)):
            items = [self._copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _next_buffer(self, tensor: Tensor) -> Tensor:
        """The memory that this tensor had in the last copy, if states are alike."""
        number, self._num_used = self._num_used, self._num_used + 1
        if number < len(self._buffers):
            buffer = self._buffers[number]
            if (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype):
                return buffer
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._buffers[number : number + 1] = [buffer]
        return buffer


class _Sink:
    """A file that remembers why it could not be written: torch's writer replaces the reason by one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        pass  # by place()


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        with begin(path).open("wb") as file:
            _save_to(_Sink(file), checkpoint)
        place(path)
    except OSError as error:
        abandon(path)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        abandon(path)
        raise


def _save_to(sink: _Sink, checkpoint: dict[str, Any]) -> None:
    try:
        torch.save(checkpoint, sink)  # type: ignore[arg-type]
    except (RuntimeError, OSError) as error:
        raise sink.error or error from None


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
