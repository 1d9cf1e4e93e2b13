"""One rank's step that is not finite is left out on all ranks, as if its update had not happened, under any strategy.

Run as a script under ``torchrun``, this file is the worker: ``FOLDER``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.ema import EMA
from datamodules.digits import DigitsDataModule
from flexidit import create_model
from flexidit.checkpoint import save_checkpoint
from lightning_modules import ClassConditional
from lightning_modules.guards import DivergedError, StepGuard
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

TINY = {"input_size": 8, "in_channels": 1, "num_classes": 10, "depth": 2, "hidden_size": 32, "num_heads": 2}
STEPS, BAD = 4, 2
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "ddp_gradient": {"strategy": "ddp", "kind": "gradient"},
    "ddp_fused": {
        "strategy": "ddp",
        "fused": True,
        "accumulate_grad_batches": 2,
        "precision": "bf16-mixed",
    },
    "fsdp": {"strategy": "fsdp", "gradient_clip_val": 0.5},
    "fsdp_gradient": {"strategy": "fsdp", "kind": "gradient", "accumulate_grad_batches": 2},
    "fsdp_fused": {"strategy": "fsdp", "fused": True, "gradient_clip_val": 0.5, "precision": "bf16-mixed"},
}


class Student(ClassConditional):
    """On rank 1 some steps have a loss, or one number of a gradient (of rank 0's shard), that is not finite."""

    def __init__(
        self,
        target: TargetSettings,
        bad: Sequence[int] = (),
        kind: str = "loss",
        fused: bool = False,
        held: bool = False,
    ) -> None:
        super().__init__(target, FlexSettings([4]), optimizer=OptimizerSettings(lr=1e-2, weight_decay=0.1))
        self.bad, self.kind, self.fused, self.held = bad, kind, fused, held

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step not in self.bad or self.global_rank != 1:
            return loss
        if self.kind == "loss":
            return loss * torch.inf
        return loss + (self.model.t_embedder.mlp[0].bias[:1].sum() * 0).sqrt()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.held and self.global_step == BAD:
            optimizer_closure()
            self.step_skipped = torch.tensor(1.0)
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        for group in found["optimizer"].param_groups:
            group["fused"] = self.fused or None
        return found


class SaveAfterBad(pl.Callback):
    """A checkpoint of the moment when a fused optimizer's host does not know yet that the step was left out."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == BAD + 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir, "saved.ckpt"))


def fit(folder: Path, strategy: str, student: Student, **options: Any) -> dict[str, Any]:
    strategies = {"ddp": DDPStrategy, "fsdp": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)}
    average, guard = EMA(0.8), StepGuard(max_in_a_row=2)
    saving = [SaveAfterBad()] if student.fused else []
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategies[strategy](),  # type: ignore[operator]
        max_steps=STEPS,
        callbacks=[average, guard, *saving],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=folder,
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(student, DigitsDataModule(batch_size=8))
            error = ""
        except DivergedError as raised:
            error = str(raised)
    state = trainer.optimizers[0].state_dict()["state"] if trainer.optimizers else {}
    tensors = {f"{number}.{key}": value for number, one in state.items() for key, value in one.items()}
    tensors |= {**dict(student.named_parameters()), **{f"ema.{name}": value for name, value in average.average.items()}}
    return {
        "tensors": {name: local(value) for name, value in tensors.items()},
        "warnings": [str(one.message) for one in caught if "left out" in str(one.message)],
        "counts": (guard.num_skipped, guard.in_a_row, trainer.global_step),
        "error": error,
    }


def local(value: Tensor) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def worker(folder: Path) -> None:
    target = TargetSettings(checkpoint=str(folder / "target.safetensors"))
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        options = {key: value for key, value in case.items() if key not in ("strategy", "kind", "fused")}
        chosen = {key: case[key] for key in ("kind", "fused") if key in case}
        guarded = Student(target, [BAD], **chosen)
        held = Student(target, fused=case.get("fused", False), held=True)
        runs = [fit(folder / name, case["strategy"], student, **options) for student in (guarded, held)]
        results[name] = dict(zip(("guarded", "held"), runs, strict=True))
    for strategy in ("ddp", "fsdp"):
        student = Student(target, range(1, 99))
        results[f"{strategy}_end"] = fit(folder / f"{strategy}_end", strategy, student)
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, randomised: Any, torchrun: Any) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    save_checkpoint(randomised(create_model("DiT-Tiny/2", **TINY)), folder / "target.safetensors")
    torchrun(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_no_rank_moves_in_a_step_that_is_not_finite_on_one(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        guarded, held = rank[case]["guarded"], rank[case]["held"]
        assert guarded["counts"] == (1, 0, STEPS)
        assert guarded["tensors"].keys() == held["tensors"].keys()
        assert all(torch.equal(value, held["tensors"][name]) for name, value in guarded["tensors"].items())


@pytest.mark.parametrize("case", CASES)
def test_rank_0_names_the_samples_of_the_rank_where_it_was_found(ranks: list[dict[str, Any]], case: str) -> None:
    [said] = ranks[0][case]["guarded"]["warnings"]
    assert ranks[1][case]["guarded"]["warnings"] == []
    assert said.startswith(f"step {BAD} was left out, the 1st of this run: at patch size 1x")
    if case.endswith("gradient"):
        assert "the gradient, though no loss, was not finite of rank 0 (digit" in said
    else:
        assert "the loss was not finite of rank 1 (digit" in said
        assert "rank 0" not in said


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_end_together_with_one_checkpoint(ranks: list[dict[str, Any]], folder: Path, strategy: str) -> None:
    [path] = (folder / f"{strategy}_end").glob("*.ckpt")
    for rank in ranks:
        assert rank[f"{strategy}_end"]["error"].startswith("3 steps in a row were not finite")
        assert str(path) in rank[f"{strategy}_end"]["error"]
    assert torch.load(path, weights_only=True)["callbacks"]["StepGuard"]["skipped"] == 3


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
