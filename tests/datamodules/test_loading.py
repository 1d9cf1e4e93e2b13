import gc
import weakref

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import Dataset

from datamodules.loading import (
    EpochSampler,
    ResumableDataModule,
    ResumableLoader,
    equal_batches,
    map_loader,
    ranks_of,
    split_indices,
)


class Numbers(Dataset):
    """Sample i of epoch e is (i, e): what was read, and when."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, draws):
        return torch.tensor([tuple(draw) for draw in draws])


def make(size=23, batch_size=4, num_workers=0, seed=0, training=True) -> ResumableLoader:
    return map_loader(
        Numbers(size),
        range(size),
        batch_size=batch_size,
        training=training,
        trainer=None,
        seed=seed,
        num_workers=num_workers,
    )


def read(loader) -> list:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("consumed", [0, 1, 3, 4])
def test_a_resumed_loader_gives_exactly_the_remaining_batches(num_workers, consumed):
    whole = [read(loader) for loader in [make()] for _ in range(3)]
    loader = make(num_workers=num_workers)
    assert read(loader) == whole[0]
    batches = iter(loader)
    begun = [next(batches).tolist() for _ in range(consumed)]
    resumed = make(num_workers=2 - num_workers)
    resumed.load_state_dict(loader.state_dict())
    assert begun + read(resumed) == whole[1]
    assert read(resumed) == whole[2]


def test_every_state_resumes_exactly():
    whole = make()
    sequence = [batch for _ in range(3) for batch in read(whole)]
    loader, position = make(), 0
    for _ in range(2):
        for _batch in loader:
            position += 1
            resumed = make()
            resumed.load_state_dict(loader.state_dict())
            assert [batch for _ in range(2) for batch in read(resumed)][:5] in (
                sequence[position : position + 5],  # the rest of the pass, then the next
            )


def test_state_is_small_plain_and_equal_on_all_ranks():
    loader = make()
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "batch": 1, "global_batch_size": 4}


def test_a_place_is_one_of_samples_whatever_the_size_of_batches():
    whole = [sample for batch in read(make(size=24)) for sample in batch]
    loader = make(size=24, batch_size=6)
    begun = [sample for _ in range(2) for sample in next(iter(loader)).tolist()]
    resumed = make(size=24, batch_size=3)
    resumed.load_state_dict(loader.state_dict())
    assert begun + [sample for batch in read(resumed) for sample in batch] == whole


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_pass_does_not_move_the_global_generators(num_workers, training):
    before = torch.get_rng_state()
    read(make(num_workers=num_workers, training=training))
    assert torch.equal(torch.get_rng_state(), before)


class Drawing(Numbers):
    """Samples are drawn from the worker's own generator."""

    def __getitems__(self, draws):
        return torch.rand(len(draws))


def test_generators_of_workers_depend_on_seed_and_epoch_only():
    def passes(seed: int) -> list:
        torch.manual_seed(len(made))
        loader = map_loader(Drawing(8), range(8), batch_size=4, training=True, trainer=None, seed=seed, num_workers=1)
        made.append(loader)
        return [read(loader) for _ in range(2)]

    made: list = []
    first = passes(0)
    assert first == passes(0)
    assert first[0] != first[1]
    assert first != passes(1)


def test_another_epoch_changes_the_order_and_the_first_returns():
    sampler = EpochSampler(range(50), shuffle=True)
    first = list(sampler)
    sampler.seek(1)
    second = list(sampler)
    sampler.seek(0)
    assert list(sampler) == first
    assert [draw.sample for draw in first] != [draw.sample for draw in second]
    assert {draw.epoch for draw in second} == {1}


def test_the_order_depends_on_seed_and_epoch_separately():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(range(50), shuffle=True, seed=seed)
        sampler.seek(epoch)
        return sampler.order().tolist()

    assert order(1, 0) != order(0, 1)
    assert sorted(order(1, 2)) == list(range(50))


@pytest.mark.parametrize("size", [22, 23])
def test_two_ranks_see_disjoint_halves_of_everything(size):
    ranks = [list(EpochSampler(range(size), shuffle=True, rank=r, world_size=2, drop_last=False)) for r in (0, 1)]
    samples = [draw.sample for rank in ranks for draw in rank]
    assert sorted(samples) == list(range(size))
    assert abs(len(ranks[0]) - len(ranks[1])) == size % 2


def test_training_ranks_have_equally_many():
    samplers = [EpochSampler(range(23), shuffle=True, rank=rank, world_size=4) for rank in range(4)]
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers] == [5] * 4


def test_a_global_step_is_the_same_on_any_number_of_ranks():
    alone = [draw.sample for draw in EpochSampler(range(24), shuffle=True)]
    ranks = [[d.sample for d in EpochSampler(range(24), shuffle=True, rank=r, world_size=3)] for r in range(3)]
    assert [set(alone[i : i + 6]) for i in range(0, 24, 6)] == [
        {sample for rank in ranks for sample in rank[i : i + 2]} for i in range(0, 8, 2)
    ]


def test_lightning_cannot_move_the_tape():
    sampler = EpochSampler(range(50), shuffle=True)
    first = list(sampler)
    sampler.set_epoch(7)
    assert list(sampler) == first


def test_a_pass_continues_where_the_last_one_stopped():
    loader = make()
    begun = [next(iter(loader)).tolist() for _ in range(2)]
    assert begun + read(loader) == read(make())


def test_evaluation_has_everything_in_order_every_time():
    loader = make(training=False)
    first = read(loader)
    assert [sample for batch in first for sample, _ in batch] == list(range(23))
    assert read(loader) == first


class Ring:
    """Garbage that only the cycle collector finds, as a closed video file is."""

    def __init__(self) -> None:
        self.itself = self


class Watch(Numbers):
    """Samples say whether something of the main process was alive when the workers began."""

    def __init__(self, watched: weakref.ref) -> None:
        super().__init__(4)
        self.watched = watched

    def __getitems__(self, draws):
        return torch.tensor([self.watched() is not None for _ in draws])


@pytest.mark.parametrize("training", [True, False])
def test_workers_inherit_no_garbage(training):
    """A worker that collects a video encoder of the main process waits for ever for threads that it has not got."""
    gc.disable()
    try:
        watched = weakref.ref(Ring())
        loader = map_loader(Watch(watched), range(4), batch_size=4, training=training, trainer=None, num_workers=1)
        assert watched() is not None
        [batch] = loader
    finally:
        gc.enable()
    assert not batch.any()


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="3 training samples do not fill one batch of 4"):
        make(size=3)


def test_ranks_without_a_trainer():
    assert ranks_of(None) == (0, 1)


def test_split_is_pure_disjoint_and_complete():
    train, val = split_indices(100, 0.1, seed=3)
    assert sorted(train + val) == list(range(100))
    assert len(val) == 10
    assert (train, val) == split_indices(100, 0.1, seed=3)
    assert val != split_indices(100, 0.1, seed=4)[1]


class Recorder(L.LightningModule):
    """Writes down what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return (self.weight - batch.float().mean()).square().sum()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(ResumableDataModule):
    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self):
        return self.resumable(make(num_workers=self.num_workers))

    def val_dataloader(self):
        return make(training=False)


def fit(folder, num_workers, ckpt_path=None, every=None, accumulate=1, **limit) -> list:
    module = Recorder()
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1) if every else None
    trainer = L.Trainer(
        **limit,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        callbacks=[checkpoints] if checkpoints else None,
        enable_checkpointing=bool(checkpoints),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=3,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, Data(num_workers), ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [{"max_steps": 13, "max_epochs": -1}, {"max_epochs": 3}])
@pytest.mark.parametrize("num_workers, accumulate", [(0, 1), (0, 2), (2, 1)])
def test_lightning_resumes_exactly_from_every_step(num_workers, accumulate, limit, tmp_path):
    """Five batches an epoch: the stops include the first and the last of an epoch, and one before a validation."""
    whole = fit(tmp_path, num_workers, every=1, accumulate=accumulate, **limit)
    steps = range(1, 9) if num_workers == 0 else (1, 4, 5, 6)
    for step in steps:
        per_epoch = -(-5 // accumulate)
        consumed = 5 * (step // per_epoch) + step % per_epoch * accumulate
        resumed = fit(tmp_path, num_workers, ckpt_path=tmp_path / f"step={step}.ckpt", accumulate=accumulate, **limit)
        assert resumed == whole[consumed:], (step, len(whole), len(resumed))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [{"max_steps": 7}, {"max_epochs": 1}, {"max_epochs": 1, "limit_train_batches": 2}])
def test_a_finished_fit_is_prolonged_exactly(first, tmp_path):
    """Lightning counts the epoch that ``max_steps`` ended as done; the data go on with the rest of it."""

    def run(ckpt_path=None, **limit) -> list:
        module = Recorder()
        trainer = L.Trainer(
            **limit,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Data(0), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.seen

    limit = {key: value for key, value in first.items() if key == "limit_train_batches"}
    whole = run(max_steps=13, **limit)
    begun = run(**first)
    assert begun + run(ckpt_path=tmp_path / "last.ckpt", max_steps=13, **limit) == whole


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_evaluation_gives_all_ranks_equally_many_batches(world_size: int, batch_size: int) -> None:
    for size in range(25):
        kept = equal_batches(range(size), batch_size, world_size)
        shares = [
            len(EpochSampler(kept, shuffle=False, rank=rank, world_size=world_size, drop_last=False))
            for rank in range(world_size)
        ]
        assert len({-(-share // batch_size) for share in shares}) == 1
        assert size - len(kept) < world_size
        assert world_size > 1 or len(kept) == size
