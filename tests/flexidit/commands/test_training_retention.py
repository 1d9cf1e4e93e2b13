"""What the shipped recipes keep on disk: a damaged ``last.ckpt`` costs the steps since an older state, not the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from flexidit.cli import main
from flexidit.weight_files import load_pickle
from tests.flexidit.commands.small_runs import kept_filters, small_run

RECIPE = Path(__file__).resolve().parents[3] / "configs" / "imagenet" / "class_conditional_xl2.yaml"
EVERY, STEPS = {True: 1, False: 2}, 7  # last.ckpt after each step, kept after every second one


def savers() -> list[dict[str, Any]]:
    """The recipe's, for a run of some steps."""
    callbacks = yaml.safe_load(RECIPE.read_text())["trainer"]["callbacks"]
    found = [callback for callback in callbacks if callback["class_path"].endswith("ModelCheckpoint")]
    for saver in found:
        is_last = saver["init_args"].get("save_last", False)
        saver["init_args"] |= {"dirpath": "ckpt", "every_n_train_steps": EVERY[is_last]}
    return found


def config() -> dict[str, Any]:
    return small_run(STEPS, {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.9}}, *savers())


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(config()))
    with kept_filters():
        yield


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which files were written, in that order."""
    written: list[str] = []
    original = Trainer.save_checkpoint

    def save(self: Trainer, path: Any, *args: Any, **options: Any) -> None:
        written.append(Path(path).name)
        original(self, path, *args, **options)

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    return written


def fit(steps: int, *options: str) -> int:
    return main(["fit", "-c", "run.yaml", "--ckpt_path=last", f"--trainer.max_steps={steps}", *options])


def on_disk() -> dict[str, int]:
    """When each checkpoint was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path("ckpt").iterdir()}


def assert_ends_as_the_whole_run(options: list[str]) -> None:
    Path("ckpt").rename("stopped")
    assert fit(STEPS, *options) == 0
    one, other = (load_pickle(Path(folder, "last.ckpt")) for folder in ("stopped", "ckpt"))
    assert one["global_step"] == other["global_step"] == STEPS
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert sorted(path.name for path in Path("stopped").iterdir()) == sorted(on_disk())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_where_last_is_damaged_the_run_goes_on_from_what_was_kept_and_says_so(
    accumulate: int, saved: list[str], flip_a_bit: Callable[[Path], Path]
) -> None:
    options = [f"--trainer.accumulate_grad_batches={accumulate}"]
    assert fit(5, *options) == 0
    assert sorted(before := on_disk()) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    flip_a_bit(Path("ckpt/last.ckpt"))
    saved.clear()
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged \(.*; going on from .*step=4\.ckpt, the newest"):
        assert fit(STEPS, *options) == 0
    assert saved == ["last.ckpt", "step=6.ckpt", "last.ckpt", "last.ckpt"]
    assert {name: time for name, time in on_disk().items() if name in ("step=2.ckpt", "step=4.ckpt")} == {
        name: time for name, time in before.items() if name != "last.ckpt"
    }
    assert_ends_as_the_whole_run(options)


def test_a_kept_state_that_is_damaged_too_is_passed_over_and_written_anew(
    saved: list[str], flip_a_bit: Callable[[Path], Path]
) -> None:
    assert fit(5) == 0
    for name in ("last", "step=4"):
        flip_a_bit(Path(f"ckpt/{name}.ckpt"))
    with pytest.warns(UserWarning, match=r"step=4\.ckpt is damaged \(.*; going on from .*step=2\.ckpt, the newest"):
        assert fit(STEPS) == 0
    assert load_pickle(Path("ckpt/step=4.ckpt"))["global_step"] == 4
    assert_ends_as_the_whole_run([])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", [3, 4])  # saved by one of both, and by both
def test_a_resume_writes_what_the_whole_run_writes_and_nothing_twice(
    steps: int, accumulate: int, saved: list[str]
) -> None:
    """In the first micro-batch after it the step's number is still that of the checkpoint."""
    options = [f"--trainer.accumulate_grad_batches={accumulate}"]
    assert fit(steps, *options) == 0
    assert fit(STEPS, *options) == 0
    stopped = [*saved]
    saved.clear()
    assert_ends_as_the_whole_run(options)
    assert stopped == saved


def test_two_that_save_at_the_same_steps_are_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(STEPS, "--trainer.callbacks.init_args.every_n_train_steps=2") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("flexidit fit: trainer.callbacks has two of a kind") and "every_n_train_steps" in message


def test_states_may_be_kept_by_time(saved: list[str]) -> None:
    """As docs/cluster.md has it; a job counts from its own start."""
    callbacks = config()["trainer"]["callbacks"]
    callbacks[1]["init_args"] |= {"every_n_train_steps": None, "train_time_interval": "0:00:00"}
    Path("run.yaml").write_text(yaml.safe_dump(config() | {"trainer": config()["trainer"] | {"callbacks": callbacks}}))
    assert fit(2) == 0
    assert saved == ["step=1.ckpt", "last.ckpt", "step=2.ckpt", "last.ckpt"]
    assert fit(3) == 0
    assert sorted(on_disk()) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
