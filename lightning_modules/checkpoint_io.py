"""Checkpoints written to disk as they are serialised, at once or while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from flexidit.sharded_files import is_sharded, read_sharded
from lightning_modules.checkpoint_files import abandon, begin, delete, place
from lightning_modules.snapshots import Snapshots


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

    Of sharded checkpoints each process writes its part so, see :mod:`lightning_modules.sharded_saves`.

    Attributes:
        group: of the processes that write shards, for what they tell one another meanwhile.
    """

    def __init__(self) -> None:
        self.group: Any = None
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
        copied = self.copy(checkpoint)
        try:
            self.submit(path, partial(super().save_checkpoint, copied, path, storage_options))
        except OSError as raised:
            error = raised
        if error is not None:
            raise error

    def copy(self, state: Any) -> Any:
        """A state on the host that training does not change, until the next one is copied: wait before."""
        return self._snapshots.take(state)

    def submit(self, path: str | Path, save: Callable[[], None]) -> None:
        """Have ``path`` saved after what was asked for before.

        Raises:
            OSError: it is one that is waited for, and could not be.
        """
        self._submit(self._save, save)
        if Path(path).name.startswith("hpc_ckpt_"):
            self.wait()

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

    def _save(self, save: Callable[[], None]) -> None:
        self._last_failed = True
        save()
        self._last_failed = False
        while self._spared:
            super().remove_checkpoint(self._spared.pop())

    def _remove(self, path: str | Path) -> None:
        if self._last_failed:
            self._spared.append(Path(path))
        else:
            super().remove_checkpoint(path)


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


def write_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Write it there, as it is serialised.

    Raises:
        OSError: it cannot be written, for the reason that the system gave.
    """
    with path.open("wb") as file:
        _save_to(_Sink(file), checkpoint)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        write_file(checkpoint, begin(path))
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
