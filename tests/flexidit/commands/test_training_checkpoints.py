"""``--ckpt_path`` of what is damaged, of another model, hostile, or left by a job that was killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flexidit import load_checkpoint
from flexidit.cli import main
from flexidit.weight_files import load_pickle
from lightning_modules import checkpoint_io
from lightning_modules.checkpoint_files import UNFINISHED
from tests.flexidit.commands.small_runs import TARGET, kept_filters, small_run

SAVER = {
    "dirpath": "ckpt",
    "filename": "{step}",
    "every_n_train_steps": 1,
    "save_top_k": -1,
    "save_last": True,
    "enable_version_counter": False,  # the copied run has another folder
}
CONFIG = small_run(3, {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": SAVER})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with a checkpoint of each and last.ckpt."""
    folder, before = tmp_path_factory.mktemp("trained"), Path.cwd()
    os.chdir(folder)
    try:
        Path("run.yaml").write_text(yaml.safe_dump(CONFIG))
        assert main(["fit", "-c", "run.yaml"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """A copy of it, where the command continues."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    with kept_filters():
        yield lambda *options: main(["fit", "-c", "run.yaml", *options])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_last_takes_the_newest_good_one_and_names_those_it_passed_over(
    run: Callable[..., int], flip_a_bit: Callable[[Path], Path]
) -> None:
    flip_a_bit(Path("ckpt/last.ckpt"))
    flip_a_bit(Path("ckpt/step=3.ckpt"))
    passed_over = r"last\.ckpt is damaged \(.*step=3\.ckpt is damaged \(.*; going on from .*step=2\.ckpt, the newest"
    with pytest.warns(UserWarning, match=passed_over):
        assert run("--ckpt_path=last", "--trainer.max_steps=4") == 0
    assert load_pickle(Path("ckpt/last.ckpt"))["global_step"] == 4


def test_a_damaged_file_is_refused_and_the_newest_good_one_offered(
    run: Callable[..., int], flip_a_bit: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("last", "step=3"):
        flip_a_bit(Path(f"ckpt/{name}.ckpt"))
    assert run("--ckpt_path=ckpt/last.ckpt", "--trainer.max_steps=4") == 2
    message = last_line(capsys)
    assert message.startswith("flexidit fit: ckpt/last.ckpt is damaged (its part ")
    assert message.endswith("the newest good one before it is ckpt/step=2.ckpt: give that to --ckpt_path")


def test_a_file_that_is_cut_short_is_refused_before_a_model_is_built(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("ckpt/last.ckpt").write_bytes(Path("ckpt/last.ckpt").read_bytes()[:-100])
    monkeypatch.setattr("lightning_modules.settings.TargetSettings.build", lambda self: pytest.fail("was built"))
    assert run("--ckpt_path=ckpt/last.ckpt") == 2
    assert "last.ckpt is damaged: its end is missing" in (message := last_line(capsys))
    assert message.endswith("the newest good one before it is ckpt/step=3.ckpt: give that to --ckpt_path")


def test_one_of_another_model_is_refused_or_passed_over(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**CONFIG["model"]["init_args"], "target": {"variant": "DiT-Tiny/2", "overrides": {**TARGET, "depth": 2}}}
    Path("other.yaml").write_text(yaml.safe_dump({**CONFIG, "model": {**CONFIG["model"], "init_args": other}}))
    elsewhere = "--trainer.callbacks.init_args.dirpath=other"
    assert main(["fit", "-c", "other.yaml", elsewhere]) == 0
    shutil.copy("other/last.ckpt", "ckpt/newer.ckpt")
    assert run("--ckpt_path=ckpt/newer.ckpt", "--trainer.max_steps=4") == 2
    message = last_line(capsys)
    assert "ckpt/newer.ckpt is of another model than the config's (depth 2 -> 1): make both agree" in message
    assert message.endswith("the newest good one before it is ckpt/last.ckpt: give that to --ckpt_path")
    with pytest.warns(UserWarning, match=r"newer\.ckpt is of another model than .* going on from .*last\.ckpt"):
        assert run("--ckpt_path=last", "--trainer.max_steps=4") == 0


def test_last_is_found_where_a_kill_took_it_away(run: Callable[..., int]) -> None:
    """Between the removal of a link and the making of the next one, or between two renames of folders."""
    Path("ckpt/last.ckpt").unlink()
    assert run("--ckpt_path=last", "--trainer.max_steps=4") == 0
    assert load_pickle(Path("ckpt/last.ckpt"))["global_step"] == 4
    written = Path("ckpt", UNFINISHED, "written", "last.ckpt")
    written.parent.mkdir(parents=True)
    for path in Path("ckpt").glob("*.ckpt"):
        path.rename(written) if path.name == "last.ckpt" else path.unlink()
    assert run("--ckpt_path=last", "--trainer.max_steps=5") == 0
    assert load_pickle(Path("ckpt/last.ckpt"))["global_step"] == 5


def test_last_counts_checkpoints_of_slurm_s_signal(run: Callable[..., int]) -> None:
    Path("ckpt/step=3.ckpt").rename("hpc_ckpt_1.ckpt")
    for path in Path("ckpt").iterdir():
        path.unlink()
    assert run("--ckpt_path=last", "--trainer.max_steps=4") == 0
    assert load_pickle(Path("ckpt/last.ckpt"))["global_step"] == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_in_the_middle_of_a_save_leaves_last_whole_and_no_trace(run: Callable[..., int]) -> None:
    before = Path("ckpt/last.ckpt").read_bytes()
    (writing := Path("ckpt", UNFINISHED, "writing")).mkdir(parents=True)
    (writing / "last.ckpt").write_bytes(before[:1000])  # as a kill in the middle leaves it
    Path("ckpt/step=1.ckpt.tmp").write_bytes(b"of somebody else")
    assert run("--ckpt_path=last", "--trainer.max_steps=3") == 0
    assert Path("ckpt/last.ckpt").read_bytes() == before
    assert not Path("ckpt", UNFINISHED).exists()
    assert Path("ckpt/step=1.ckpt.tmp").exists()


def test_a_disk_that_is_full_costs_a_warning_and_for_ever_an_error(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sink: Any, checkpoint: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_io, "_save_to", refuse)
    before = Path("ckpt/last.ckpt").read_bytes()
    with pytest.warns(UserWarning, match=r"step=4\.ckpt could not be saved \(No space left on device\): training goes"):
        assert run("--ckpt_path=last", "--trainer.max_steps=5") == 2
    assert "not one of this run's 4 checkpoints could be saved (No space left on device)" in last_line(capsys)
    assert Path("ckpt/last.ckpt").read_bytes() == before
    assert sorted(path.name for path in Path("ckpt").iterdir()) == [
        "last.ckpt", "step=1.ckpt", "step=2.ckpt", "step=3.ckpt"
    ]  # fmt: skip


def test_a_config_can_have_checkpoints_written_in_the_background(run: Callable[..., int]) -> None:
    background = {"trainer": {"plugins": [{"class_path": "lightning_modules.checkpoint_io.BackgroundCheckpointIO"}]}}
    Path("background.yaml").write_text(yaml.safe_dump(background))
    assert run("-c", "background.yaml", "--ckpt_path=last", "--trainer.max_steps=5") == 0
    Path("ckpt").rename("background")
    shutil.copytree("background", "ckpt", ignore=lambda folder, names: ["step=4.ckpt", "step=5.ckpt", "last.ckpt"])
    assert run("--ckpt_path=last", "--trainer.max_steps=5") == 0
    one, other = (load_pickle(Path(name, "last.ckpt")) for name in ("background", "ckpt"))
    assert one["global_step"] == other["global_step"] == 5
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


@pytest.mark.parametrize("command", ["fit", "validate", "load", "convert"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(
    run: Callable[..., int], hostile: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = hostile(Path("ckpt/hostile.ckpt"))
    if command == "load":
        with pytest.raises(ValueError, match=r"hostile\.ckpt holds objects that only running its code could rebuild"):
            load_checkpoint(path)
    else:
        convert = ["convert", str(path), "out.safetensors", "--to", "flexidit"]
        train = [command, "-c", "run.yaml", f"--ckpt_path={path}"]
        assert main(convert if command == "convert" else train) == 2
        assert "hostile.ckpt holds objects that only running its code could rebuild" in last_line(capsys)
    assert not Path("ckpt/was_run").exists()


@pytest.mark.parametrize("command", ["fit", "load", "convert"])
def test_old_checkpoints_of_others_that_hold_code_are_refused(
    run: Callable[..., int], test_data: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for path in sorted((test_data / "lightning_ckpts").rglob("*.ckpt")):
        if command == "load":
            with pytest.raises(ValueError, match=f"{path.name} holds objects that only running its code"):
                load_checkpoint(path)
            continue
        convert = ["convert", str(path), "out.safetensors", "--to", "flexidit"]
        assert main(convert if command == "convert" else ["fit", "-c", "run.yaml", f"--ckpt_path={path}"]) == 2
        assert f"{path.name} holds objects that only running its code could rebuild" in last_line(capsys)
