"""The average against its closed form; swapped in and out exactly; saved, resumed and sharded without a difference."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from callbacks.ema import EMA


class Toy(LightningModule):
    """A regression whose data are a function of the step, so that a resumed run sees what an uninterrupted one sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.validated: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.global_step))
        return self.frozen(self.net(x)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.net.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=0.1)


class Recorder(Callback):
    """Raw weights after every batch, with the optimizer step that made them."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.weights[trainer.global_step] = pl_module.net.weight.detach().clone()


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


def fit(root: Path, *callbacks: Callback, steps: int = 6, ckpt_path: Path | None = None, **kwargs: Any) -> Toy:
    module = Toy()
    trainer = Trainer(default_root_dir=root, max_steps=steps, accelerator="cpu", devices=1, logger=False, **{
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "limit_val_batches": 0, "callbacks": list(callbacks)} | kwargs)  # fmt: skip
    trainer.fit(module, loader(), loader(1), ckpt_path=ckpt_path, weights_only=True)
    return module


def loader(num_batches: int = 100) -> DataLoader[Tensor]:
    return DataLoader(torch.zeros(num_batches, 1), batch_size=1)


def closed_form(start: Tensor, weights: list[Tensor], decays: list[float]) -> Tensor:
    average = start.double()
    for weight, decay in zip(weights, decays, strict=True):
        average = decay * average + (1 - decay) * weight.double()
    return average


def test_equals_its_closed_form(tmp_path: Path) -> None:
    ema, recorder, start = EMA(decay=0.9), Recorder(), Toy().net.weight.detach()
    fit(tmp_path, ema, recorder)
    weights = [recorder.weights[step] for step in range(1, 7)]
    torch.testing.assert_close(ema.average["net.weight"].double(), closed_form(start, weights, [0.9] * 6))
    # The same as one weighted sum: decay^n start + sum of (1 - decay) decay^(n - i) w_i.
    weighted = 0.9**6 * start.double() + sum(0.1 * 0.9 ** (5 - i) * w.double() for i, w in enumerate(weights))
    torch.testing.assert_close(ema.average["net.weight"].double(), weighted)


def test_trainable_parameters_only_in_float32() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)).to(torch.bfloat16)
    ema = EMA(decay=0.9999)
    ema.update(module)
    assert list(ema.average) == ["0.weight", "0.bias"]
    assert all(value.dtype == torch.float32 for value in ema.average.values())


def test_moves_where_bfloat16_could_not() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    module.weight.data.fill_(1.0)
    ema = EMA(decay=0.9999)
    ema.update(module)
    module.weight.data.fill_(2.0)
    ema.update(module)
    torch.testing.assert_close(ema.average["weight"], torch.tensor([[1.0001]]), rtol=0, atol=1e-7)


def test_accumulated_batches_count_once(tmp_path: Path) -> None:
    ema, recorder, start = EMA(decay=0.5), Recorder(), Toy().net.weight.detach()
    fit(tmp_path, ema, recorder, steps=3, accumulate_grad_batches=4)
    assert ema.num_updates == 3
    expected = closed_form(start, [recorder.weights[step] for step in (1, 2, 3)], [0.5] * 3)
    torch.testing.assert_close(ema.average["net.weight"].double(), expected)


def test_every_n_steps_keeps_the_horizon(tmp_path: Path) -> None:
    ema, recorder, start = EMA(decay=0.9, every_n_steps=3), Recorder(), Toy().net.weight.detach()
    fit(tmp_path, ema, recorder)
    expected = closed_form(start, [recorder.weights[step] for step in (3, 6)], [0.9**3] * 2)
    torch.testing.assert_close(ema.average["net.weight"].double(), expected)


def test_warmup_starts_low_and_ends_at_decay() -> None:
    decays = [EMA(decay=0.99, warmup=True).decay_at(n) for n in range(2000)]
    assert decays[0] == pytest.approx(0.1) and decays[-1] == 0.99
    assert decays == sorted(decays)
    assert EMA(decay=0.99).decay_at(0) == 0.99


def test_swapped_restores_bit_for_bit_even_after_an_exception() -> None:
    module, ema = nn.Linear(3, 3), EMA(decay=0.5)
    ema.update(module)
    module.weight.data.add_(1.0)
    raw = copy.deepcopy(module.state_dict())

    def sample() -> None:
        with ema.swapped(module):
            assert torch.equal(module.weight, ema.average["weight"])
            with ema.swapped(module):  # nested: nothing happens, nor at its end
                pass
            assert torch.equal(module.weight, ema.average["weight"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        sample()
    assert all(torch.equal(value, raw[name]) for name, value in module.state_dict().items())


def test_swapped_without_an_average_changes_nothing() -> None:
    module = nn.Linear(2, 2)
    weight = module.weight.detach().clone()
    with EMA().swapped(module):
        assert torch.equal(module.weight, weight)


def test_validation_sees_the_average_and_training_does_not(tmp_path: Path) -> None:
    ema, recorder = EMA(decay=0.9), Recorder()
    module = fit(tmp_path, ema, recorder, limit_val_batches=1, val_check_interval=3, num_sanity_val_steps=1)
    plain = Recorder()
    fit(tmp_path, plain)
    assert all(torch.equal(recorder.weights[step], plain.weights[step]) for step in range(1, 7))
    start = Toy().net.weight.detach()
    expected = [closed_form(start, [plain.weights[i] for i in range(1, n + 1)], [0.9] * n) for n in (0, 3, 6)]
    for seen, value in zip(module.validated, expected, strict=True):
        torch.testing.assert_close(seen.double(), value)


def test_an_exception_in_validation_leaves_the_raw_weights(tmp_path: Path) -> None:
    class Fails(Toy):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            raise RuntimeError("in validation")

    recorder, module = Recorder(), Fails()
    trainer = Trainer(default_root_dir=tmp_path, max_steps=4, accelerator="cpu", logger=False, val_check_interval=2,
                      num_sanity_val_steps=0, enable_progress_bar=False, enable_checkpointing=False,
                      enable_model_summary=False, callbacks=[EMA(decay=0.9), recorder])  # fmt: skip
    with pytest.raises(RuntimeError, match="in validation"):
        trainer.fit(module, loader(), loader(1))
    assert torch.equal(module.net.weight, recorder.weights[2])


def test_crash_and_resume_give_the_same_average(tmp_path: Path) -> None:
    whole = EMA(decay=0.9, every_n_steps=2, warmup=True)
    fit(tmp_path, whole, steps=9)
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, EMA(decay=0.9, every_n_steps=2, warmup=True), saver, Crash(5), steps=9, enable_checkpointing=True)
    resumed = EMA(decay=0.9, every_n_steps=2, warmup=True)
    fit(tmp_path, resumed, steps=9, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.num_updates == whole.num_updates == 4
    assert all(torch.equal(value, whole.average[name]) for name, value in resumed.average.items())


def test_the_checkpoint_loads_with_weights_only_and_serves_validate(tmp_path: Path) -> None:
    ema, saver = EMA(decay=0.9), ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=6)
    fit(tmp_path, ema, saver, enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["EMA"]
    assert torch.equal(state["average"]["net.weight"], ema.average["net.weight"])
    module = Toy()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[EMA()])
    trainer.validate(module, loader(1), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert torch.equal(module.validated[0], ema.average["net.weight"])


def test_a_checkpoint_saved_during_validation_holds_the_raw_weights(tmp_path: Path) -> None:
    class SavesInside(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    recorder, ema = Recorder(), EMA(decay=0.9)
    fit(tmp_path, ema, recorder, SavesInside(), limit_val_batches=1, val_check_interval=6, num_sanity_val_steps=0)
    checkpoint = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["net.weight"], recorder.weights[6])
    assert torch.equal(checkpoint["callbacks"]["EMA"]["average"]["net.weight"], ema.average["net.weight"])


def test_another_models_average_is_refused() -> None:
    ema = EMA()
    ema.load_state_dict({"average": {"weight": torch.zeros(2, 2)}, "num_updates": 1, "last_step": 1})
    with pytest.raises(ValueError, match="differ in 1 names, the first is 'bias'"), ema.swapped(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize(("kwargs", "message"), [({"decay": 1.5}, "decay"), ({"every_n_steps": 0}, "every_n_steps")])
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(**kwargs)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))  # 5 rows over 2 ranks: uneven shards


def two_updates(net: nn.Sequential, ema: EMA) -> None:
    for step in range(2):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(step + 1.0)
        ema.update(net)


def check_sharded(rank: int, init_file: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    net, ema = make_net(), EMA(decay=0.75)
    for layer in (*net, net):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    two_updates(net, ema)
    x = torch.ones(1, 3)
    before = net(x).detach()  # leaves the root unsharded, as a validation forward does
    with ema.swapped(net), torch.no_grad():
        inside = net(x)
    after = net(x).detach()
    assert torch.equal(before, after)
    assert isinstance(ema.average["0.weight"], DTensor)
    state = ema.state_dict()
    if rank == 0:
        torch.save({"state": state, "inside": inside}, out)
    torch.distributed.barrier()
    resumed = EMA(decay=0.75)
    resumed.load_state_dict(torch.load(out, weights_only=True)["state"])
    with resumed.swapped(net), torch.no_grad():
        assert torch.equal(net(x), inside)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive their group, and unloading them has aborted a rank that was done


def test_sharded_equals_whole(tmp_path: Path) -> None:
    mp.spawn(check_sharded, args=(str(tmp_path / "init"), str(tmp_path / "out.pt")), nprocs=2)
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    net, ema = make_net(), EMA(decay=0.75)
    two_updates(net, ema)
    for name, value in ema.average.items():
        torch.testing.assert_close(saved["state"]["average"][name], value)
    with ema.swapped(net), torch.no_grad():
        torch.testing.assert_close(saved["inside"], net(torch.ones(1, 3)))


def test_an_update_on_a_step_that_was_left_out_changes_nothing() -> None:
    module = nn.Linear(3, 2)
    ema, taken = EMA(0.9), EMA(0.9)
    for one in (ema, taken):
        one.update(module)
    before = {name: value.clone() for name, value in ema.average.items()}
    nn.init.normal_(module.weight)
    ema.update(module, torch.tensor(1.0))
    assert all(torch.equal(value, before[name]) for name, value in ema.average.items())
    assert ema.num_updates == 2  # it takes its number, as the step does
    ema.update(module, torch.tensor(0.0))
    taken.update(module)
    assert all(torch.equal(value, taken.average[name]) for name, value in ema.average.items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_verdict_that_stays_on_the_device_has_the_same_effect_to_the_bit(device: str) -> None:
    # What a GPU does instead of looking: the share as a tensor, one a parameter.
    share = 1 - 0.9999
    weights = [torch.randn(7, 5, device=device), torch.randn(11, device=device)]
    averages = [torch.randn_like(weight) for weight in weights]
    expected = [average.clone() for average in averages]
    torch._foreach_lerp_(expected, weights, share)
    found = [average.clone() for average in averages]
    torch._foreach_lerp_(found, weights, [share * (1 - torch.tensor(1.0, device=device))] * 2)
    assert all(map(torch.equal, found, averages))
    torch._foreach_lerp_(found, weights, [share * (1 - torch.tensor(0.0, device=device))] * 2)
    assert all(map(torch.equal, found, expected))
