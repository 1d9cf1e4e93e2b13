"""``flexidit fit`` as users run it: mistakes in one sentence, and a resume that nobody can tell from a whole run."""

from __future__ import annotations

import csv
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flexidit import load_checkpoint
from flexidit.cli import TRAINING_COMMANDS, main

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_modules.ClassConditional",
        "init_args": {
            "target": {
                "variant": "DiT-Tiny/2",
                "overrides": {"input_size": 8, "in_channels": 1, "num_classes": 10, "depth": 1, "hidden_size": 32},
            },
            "flex": {"patch_sizes": [4]},
            "matching": {"weight": 0.5, "start_step": 2, "every_n_steps": 2, "num_timesteps": 50},
            "optimizer": {"lr": 1.0e-3, "warmup_steps": 8},
        },
    },
    "data": {"class_path": "datamodules.digits.DigitsDataModule", "init_args": {"batch_size": 128}},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 3,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": ".", "version": ""}},
        "callbacks": [
            {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.9}},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "ckpt", "every_n_train_steps": 1, "save_top_k": 0, "save_last": True},
            },
        ],
    },
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In a folder of its own; the command's own filter on Lightning's log is taken off again."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    filters = list(logger.filters)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    yield
    logger.filters[:] = filters


def fit(*options: str) -> int:
    return main(["fit", "-c", "run.yaml", *options])


def losses(name: str) -> dict[int, dict[str, str]]:
    """What was logged in training, as text, by step."""
    steps: dict[int, dict[str, str]] = defaultdict(dict)
    with Path(name, "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            steps[int(row["step"])] |= {key: row[key] for key in row if key.startswith("train/") and row[key]}
    return {step: values for step, values in steps.items() if values}


# An epoch has 12 batches: 7 steps end in the middle of the first, with accumulation in the middle of the second; and 6
# right after a validation. Steps 4, 6, 8, ... have the matching loss.
@pytest.mark.parametrize("steps, accumulate", [(7, 1), (6, 1), (7, 2)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(steps: int, accumulate: int) -> None:
    common = [f"--trainer.accumulate_grad_batches={accumulate}"]
    whole = ["--trainer.logger.init_args.name=whole", "--trainer.callbacks.init_args.dirpath=whole/ckpt"]
    assert fit(*common, *whole, f"--trainer.max_steps={2 * steps}") == 0
    assert fit(*common, "--trainer.logger.init_args.name=first", f"--trainer.max_steps={steps}") == 0
    torch.manual_seed(1234)
    resumed = ["--trainer.logger.init_args.name=second", "--ckpt_path=last", "--seed_everything=9"]
    assert fit(*common, *resumed, f"--trainer.max_steps={2 * steps}") == 0

    expected = losses("whole")
    assert len(expected) == 2 * steps
    assert any("train/mmd" in values for values in expected.values())
    assert {**losses("first"), **losses("second")} == expected
    one, other = (torch.load(path, weights_only=True) for path in ("whole/ckpt/last.ckpt", "ckpt/last.ckpt"))
    assert one["global_step"] == other["global_step"] == 2 * steps
    assert one["callbacks"]["EMA"]["num_updates"] == 2 * steps
    for part in (
        lambda c: c["state_dict"],
        lambda c: c["callbacks"]["EMA"]["average"],
        lambda c: {f"{i}.{k}": v for i, s in c["optimizer_states"][0]["state"].items() for k, v in s.items()},
    ):
        assert part(one)
        assert all(torch.equal(value, part(other)[name]) for name, value in part(one).items())


def test_the_last_checkpoint_is_a_model_and_can_be_validated(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_steps=2") == 0
    assert load_checkpoint("ckpt/last.ckpt").patch_sizes[1].name == "1x4x4"
    assert main(["validate", "-c", "run.yaml", "--ckpt_path=ckpt/last.ckpt"]) == 0
    assert "val/loss_1x4x4" in capsys.readouterr().out


def test_last_without_a_checkpoint_starts_from_the_beginning() -> None:
    assert fit("--trainer.max_steps=1", "--ckpt_path=last") == 0


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["-c", "missing.yaml"], "missing.yaml"),
        (["--model", "lightning_modules.Nobody"], "no attribute 'Nobody'"),
        (["--model.init_args.learning_rate", "1"], "'learning_rate' is not accepted"),
        (["--model.init_args.target.checkpoint", "missing.pt"], "no checkpoint at missing.pt"),
        (["--model.init_args.flex.patch_sizes", "[1]"], "1x1x1 is not larger than the pre-trained 1x2x2"),
        (["--model.init_args.flex.patch_sizes", "4"], 'Parser key "patch_sizes"'),
        (["--trainer.nothing", "1"], "unrecognized arguments: --trainer.nothing"),
        (["--ckpt_path", "missing.ckpt"], "no checkpoint at missing.ckpt"),
        (["--trainer.devices", "0"], "devices='0'"),
        (["--data.init_args.size", "16"], "samples of shape (1, 16, 16), the model takes (1, 8, 8)"),
    ],
)
def test_mistakes_end_in_one_sentence(options: list[str], complaint: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.fast_dev_run=1", *options) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("flexidit fit: ")
    assert complaint in last


def test_a_checkpoint_that_is_none_or_another_model_s_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.zeros(1)}, "weights.pt")
    assert fit("--ckpt_path=weights.pt", "--trainer.max_steps=1") == 2
    assert "weights go to target.checkpoint" in capfd.readouterr().err
    assert fit("--trainer.max_steps=1") == 0
    assert fit("--trainer.max_steps=2", "--ckpt_path=last", "--model.init_args.flex.patch_sizes=[4,8]") == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert "last.ckpt is of another model than the config's (flex.weak_patch_sizes" in message
    assert "there is no good one in " in message


def test_a_checkpoint_with_code_in_it_is_refused(test_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unsafe = next((test_data / "lightning_ckpts").rglob("*.ckpt"))
    assert fit(f"--ckpt_path={unsafe}") == 2
    assert "only running its code could rebuild" in capfd.readouterr().err


@pytest.mark.parametrize("command", TRAINING_COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"flexidit {command} -c " in capsys.readouterr().out


def test_an_earlier_run_is_not_written_beside(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning would write last-v1.ckpt, and all other commands would go on reading last.ckpt."""
    assert fit("--trainer.max_steps=1") == 0
    before = Path("ckpt/last.ckpt").read_bytes()
    assert fit("--trainer.max_steps=1") == 2
    assert "continue it with --ckpt_path last" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in Path("ckpt").iterdir()] == ["last.ckpt"]
    assert Path("ckpt/last.ckpt").read_bytes() == before


@pytest.mark.parametrize("given", ["last", "ckpt/last.ckpt"])
@pytest.mark.parametrize("content", [b"some text", b"", None], ids=["text", "empty", "cut"])
def test_a_damaged_checkpoint_is_one_sentence(
    given: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_steps=1") == 0
    file = Path("ckpt/last.ckpt")
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    capsys.readouterr()
    assert fit("--trainer.max_steps=2", "--ckpt_path", given) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "last.ckpt is damaged" in message or "last.ckpt is not a checkpoint" in message
    assert "there is no good one in " in message


def test_a_run_that_diverges_ends_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="step 1 was left out, the 1st of this run"):
        code = fit("--trainer.max_steps=40", "--model.init_args.optimizer.lr=1e38")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert said.startswith("flexidit fit: 11 steps in a row were not finite and were left out, the run has diverged: ")
    assert Path("ckpt", "good_step=12.ckpt").is_file()
    lines = [json.loads(line) for line in Path("skipped_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 12))
    assert all(len(line["ranks"][0]["bad"]) == 128 for line in lines)


def test_a_data_process_that_dies_ends_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any) -> None:  # torch's signal handler raises wherever the main process is
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")

    monkeypatch.setattr("lightning_modules.base.DiffusionModule.loss", die)
    assert fit("--trainer.max_steps=2") == 2
    assert "flexidit fit: process 12, which read data, died (Killed): " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--resume.allow_changes", "--resume.allow-changes", "config"])
def test_changed_settings_are_refused_by_name_or_allowed(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_steps=1") == 0
    changed = ["--trainer.max_steps=2", "--ckpt_path=last", "--model.init_args.optimizer.lr=0.5", "--data.seed=1"]
    assert fit(*changed) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "(model.optimizer.lr 0.001 -> 0.5, data.seed 0 -> 1)" in last
    assert "--resume.allow_changes" in last
    Path("allow.yaml").write_text("resume: {allow_changes: true}\n")
    assert fit(*changed, *(["-c", "allow.yaml"] if option == "config" else [option])) == 0
    saved = torch.load("ckpt/last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.5
    assert saved["flexidit"]["run"]["settings"]["data"]["seed"] == 1


def test_a_new_run_from_old_weights_is_no_resume(capfd: pytest.CaptureFixture[str]) -> None:
    """One command line starts it, and continues it where it has begun; another run's checkpoint is another start."""
    assert fit("--trainer.max_steps=3") == 0
    Path("ckpt").rename("first")
    new = ["--model.init_from=first/last.ckpt", "--model.init_args.flex.patch_sizes=[4,8]"]
    assert fit(*new, "--trainer.max_steps=5", "--ckpt_path=first/last.ckpt") == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "--ckpt_path first/last.ckpt continues a run and model.init_from first/last.ckpt starts a new one" in last
    for steps in (1, 2):
        assert fit(*new, f"--trainer.max_steps={steps}", "--ckpt_path=last") == 0
        assert torch.load("ckpt/last.ckpt", weights_only=True)["global_step"] == steps
    assert [size.name for size in load_checkpoint("ckpt/last.ckpt").patch_sizes] == ["1x2x2", "1x4x4", "1x8x8"]
    assert main(["validate", "-c", "run.yaml", *new, "--ckpt_path=ckpt/last.ckpt"]) == 0
