"""Loaders that resume exactly: order as a pure function of (seed, epoch), position in the checkpoint.

Facts about Lightning that shape this file: it keeps the loader state of rank 0 only, so the state must mean the same
on every rank. Its epoch count is not that of the data: a fit that ``max_steps`` ended inside an epoch counts that epoch
as done, and a checkpoint at the end of an epoch does not restore the loader. And it replaces samplers in distributed
runs unless they are ``DistributedSampler``s, so ours is one, and ``use_distributed_sampler`` has no effect on it.
"""

import gc
import logging
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from time import monotonic, sleep
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from flexidit.draws import Draw
from flexidit.worker_faults import explain_worker, is_broken_handover

# torchdata 0.11 calls a function that newer torch deprecates; nothing a user could act on
warnings.filterwarnings("ignore", message=".*set_vital.*", category=UserWarning)
logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")
_SECONDS_BETWEEN_LOOKS = 300.0
_SECONDS_FOR_SIGNAL = 3.0


class EpochSampler(DistributedSampler[Draw]):
    """Draws of one rank, in an order that is a pure function of (seed, epoch).

    Rank r takes every world_size-th place of the common order, starting at r. A step of all ranks is therefore one
    run of that order, whatever the number of ranks. Nothing is repeated to make ranks equal: with ``drop_last`` all
    ranks get the same number (training), without it they may differ by one sample (evaluation).

    Args:
        indices: the samples to draw from, positions in the data set.
        shuffle: False keeps the order, and the epoch at 0, so that every evaluation sees the same.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        drop_last: leave out the samples that do not divide among the ranks.
    """

    def __init__(
        self,
        indices: Sequence[int],
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        self.indices = torch.as_tensor(indices, dtype=torch.int64)
        dataset: Any = range(len(indices))  # the base class only asks for its length
        super().__init__(dataset, world_size, rank, shuffle, seed, drop_last)
        self.start = 0

    @property
    def size(self) -> int:
        """Samples of all ranks together."""
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: Lightning calls this with its own count, which runs ahead of the data after some resumes."""

    def seek(self, epoch: int, start: int = 0) -> None:
        """Choose the order of the next iterators, and how many draws of the rank to leave out."""
        self.epoch, self.start = epoch, start

    def order(self) -> Tensor:
        """Positions in the data set for this rank and epoch, (samples of the rank,)."""
        order = self.indices
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
            order = order[torch.randperm(len(order), generator=generator)]
        if self.drop_last:
            order = order[: len(order) // self.num_replicas * self.num_replicas]
        return order[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        return (Draw(sample, epoch) for sample in self.order()[self.start :].tolist())

    def __len__(self) -> int:
        shared, rest = divmod(len(self.indices), self.num_replicas)
        return shared + (not self.drop_last and self.rank < rest)


def _mix(seed: int, epoch: int) -> int:
    """One seed for two numbers; neighbours do not overlap as ``seed + epoch`` would: (1, 0) and (0, 1) differ."""
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + 1) % 2**63


class ResumableLoader(StatefulDataLoader[Any]):
    """torchdata's loader as a tape: a training pass continues where the last one stopped, also across a resume.

    The state is the place on the tape, (epoch, batches consumed in it): equal on all ranks, independent of the number
    of workers, of how often validation interrupts, of ``limit_train_batches`` and of Lightning's own epoch count. A
    resume jumps in the sampler's order instead of reading again; tars have no such order, so there the consumed
    batches of the epoch are read again and dropped. Work starts at the first ``next``.

    The global random generators are neither read nor moved by a pass. Those of workers start anew with every pass, in a
    way that depends on (seed, epoch, worker) only: data that draw from them in a worker see other numbers after a
    resume in mid-epoch, data that are keyed by their :class:`~flexidit.draws.Draw` do not.

    An evaluation loader has no tape: every pass is the whole.
    """

    _at = (0, 0)
    """(epoch, batches consumed in it)"""

    @property
    def cursor(self) -> Any:
        """The object that knows the order: the sampler, or an iterable data set."""
        return self.dataset if self._streams else self.sampler

    @property
    def _streams(self) -> bool:
        return isinstance(self.dataset, IterableDataset)

    def __len__(self) -> int:
        if not self._streams:
            return super().__len__()
        if self.cursor.num_batches is None:
            raise TypeError("the length of one pass over tars is not known")
        return int(self.cursor.num_batches)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _watched(self._pass(), getattr(self.dataset, "check_files", None))

    def _pass(self) -> Iterator[Any]:
        if self.num_workers:
            gc.collect()  # left to a forked worker, a video encoder in a cycle waits for ever for threads it lost
        if not self.cursor.shuffle:
            self._seed_workers(0)
            yield from self._whole()
            return
        epoch, start = self._at if self._at[1] < len(self) else (self._at[0] + 1, 0)
        for consumed, batch in enumerate(self._read(epoch, start), start + 1):
            self._at = (epoch, consumed)
            yield batch
        self._at = (epoch + 1, 0)

    def _whole(self) -> Iterator[Any]:
        """The batches of an evaluation; a rank with fewer than others reads its first ones again: none waits.

        What was read before, here or by another rank, is marked as ``repeated``, and counts for nothing.
        """
        wanted = self.cursor.num_batches if self._streams else None
        if wanted is None:
            yield from super().__iter__()
            return
        count, is_repeated = 0, self.cursor.reads_what_others_read
        while count < wanted:
            before = count
            for batch in islice(super().__iter__(), wanted - count):
                count += 1
                yield {**batch, "repeated": True} if is_repeated else batch
            is_repeated = True
            if count == before:
                raise ValueError("one process finds no sample to evaluate in its tars: write more and smaller ones")

    def _read(self, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from ``start`` on."""
        self._seed_workers(epoch)
        if self._streams:
            self.cursor.seek(epoch)
            return islice(super().__iter__(), start, len(self))
        self.cursor.seek(epoch, start * (self.batch_size or 1))
        return super().__iter__()

    def _seed_workers(self, epoch: int) -> None:
        # Without a generator of its own torch's loader draws a seed from the global one at each start, a resume too.
        self.generator = torch.Generator().manual_seed(_mix(self.cursor.seed, epoch))

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is."""
        epoch, consumed = self._at
        return {"epoch": epoch, "batch": consumed, "global_batch_size": self._global_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue there, also with batches of another size; what else changed is not known here."""
        samples = state_dict["batch"] * state_dict["global_batch_size"]
        self._at = (state_dict["epoch"], samples // self._global_batch_size)

    @property
    def is_fresh(self) -> bool:
        """Whether no batch was taken of it."""
        return self._at == (0, 0)

    @property
    def _global_batch_size(self) -> int:
        return (self.batch_size or 1) * self.cursor.num_replicas


def _watched(batches: Iterator[Batch], check_files: Callable[[], None] | None) -> Iterator[Batch]:
    """The same batches, with a look at the files now and then, and failures of worker processes in one sentence."""
    next_look = -math.inf
    while True:
        try:
            if check_files is not None and monotonic() > next_look:
                check_files()
                next_look = monotonic() + _SECONDS_BETWEEN_LOOKS
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if (told := explain_worker(_with_signal(error))) is None:
                raise
            raise told from error
        yield batch


def _with_signal(error: Exception) -> Exception:
    """The error or, if that is but a broken connection, what the signal of the process that broke it says."""
    if is_broken_handover(error):
        try:
            sleep(_SECONDS_FOR_SIGNAL)  # torch's handler raises in the middle of it
        except RuntimeError as died:
            return died
    return error


class ResumableDataModule(L.LightningDataModule):
    """Keeps the place of the training loader in the checkpoint.

    Lightning stores the state of loaders too, but does not load it where it counts an epoch as finished, and then
    the order would start again at epoch 0.
    """

    _train_loader: ResumableLoader | None = None
    _train_state: dict[str, Any] | None = None

    @property
    def resume_settings(self) -> dict[str, Any]:
        """What decides which batches come in which order, in plain values, for a resume to be compared with.

        ``batch_size``, of one process, may change as long as that of a whole step stays.
        """
        return {"class": type(self).__name__}

    def resumable(self, loader: ResumableLoader) -> ResumableLoader:
        """The training loader, moved to the place of the checkpoint that is being resumed."""
        if self._train_state is not None:
            loader.load_state_dict(self._train_state)
        self._train_loader, self._train_state = loader, None
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Place of the training loader; the same on all ranks."""
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the place for the loader that is made next.

        A sharded run whose learning rate follows the length of the epochs has made its loader already.
        """
        self._train_state = state_dict.get("train_loader")
        if self._train_state is not None and self._train_loader is not None and self._train_loader.is_fresh:
            self.resumable(self._train_loader)


def equal_batches(indices: Sequence[int], batch_size: int, world_size: int) -> Sequence[int]:
    """The indices, without the last few if those would give some ranks one batch more than others.

    A rank with a batch of its own would wait for ever in the first collective of its forward pass, as sharded models
    have them. Fewer than ``world_size`` samples are left out, and only in that case.

    Example:
        >>> len(equal_batches(range(9), 4, 2)), len(equal_batches(range(11), 4, 2))
        (8, 11)
    """
    shared, rest = divmod(len(indices), world_size)
    return indices[: shared * world_size] if rest and shared % batch_size == 0 else indices


def map_loader(
    dataset: Dataset[Any],
    indices: Sequence[int],
    *,
    batch_size: int,
    training: bool,
    trainer: L.Trainer | None,
    seed: int = 0,
    num_workers: int = 0,
) -> ResumableLoader:
    """Loader over part of a map-style data set that returns whole batches (``__getitems__``).

    Training shuffles and drops the last incomplete batch; evaluation keeps order and everything that
    :func:`equal_batches` keeps.

    Raises:
        ValueError: if training would have no batch.
    """
    rank, world_size = ranks_of(trainer)
    if training and len(indices) < batch_size * world_size:
        raise ValueError(
            f"{len(indices)} training samples do not fill one batch of {batch_size} on {world_size} process(es): "
            f"lower batch_size"
        )
    if not training:
        indices = equal_batches(indices, batch_size, world_size)
    sampler = EpochSampler(indices, shuffle=training, seed=seed, rank=rank, world_size=world_size, drop_last=training)
    return ResumableLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=training,
        num_workers=num_workers,
        collate_fn=identity,
        worker_init_fn=outlive_preemption,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )


def stream_loader(dataset: Any, batch_size: int, num_workers: int = 0) -> ResumableLoader:
    """Loader over a :class:`~datamodules.tar_samples.TarSamples`, which is split among ranks by itself.

    Raises:
        ValueError: if there are fewer tars than reading processes.
    """
    dataset.check_shards(num_workers)
    workers = num_workers if dataset.training else min(num_workers, len(dataset.tars))
    if not dataset.training and dataset.num_replicas > 1:
        dataset.num_batches = dataset.count_even_batches(batch_size, workers)
    return ResumableLoader(
        dataset,
        batch_size=batch_size,
        drop_last=dataset.training,
        num_workers=workers,
        worker_init_fn=outlive_preemption,
        pin_memory=torch.cuda.is_available(),
    )


def split_indices(num_samples: int, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, val) positions, each ascending; a pure function of the arguments."""
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)).tolist()
    num_val = round(num_samples * val_fraction)
    return sorted(order[num_val:]), sorted(order[:num_val])


def check_fraction(val_fraction: float) -> None:
    """Refuse a share of validation data outside [0, 1)."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is at least 0 and below 1, got {val_fraction}")


def ranks_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """(rank, world size) from the trainer, else from an initialised process group, else (0, 1)."""
    if trainer is not None:
        return trainer.global_rank, trainer.world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def identity(batch: Batch) -> Batch:
    """Collate function of data sets that return whole batches."""
    return batch


def outlive_preemption(worker: int) -> None:
    """Have a reading process pass over the first SIGTERM: launchers send it to whole groups, and the step must end.

    The next one ends it, which is how torch and multiprocessing end processes that are stuck.
    """

    def pass_over(signum: int, frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, pass_over)
