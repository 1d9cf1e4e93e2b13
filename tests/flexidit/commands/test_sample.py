from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from flexidit import PatchSchedule, Sampler, create_model, flexify, flops, load_checkpoint, save_checkpoint
from flexidit.cli import main

Checkpoint = Callable[..., str]


@pytest.fixture
def checkpoint(randomised: Callable[..., nn.Module], tmp_path: Path) -> Checkpoint:
    """A random model on disk."""

    def make(recipe: str | None = "shared", in_channels: int = 1, **config: Any) -> str:
        model = create_model("DiT-Tiny/2", input_size=8, num_classes=10, in_channels=in_channels, **config)
        randomised(model)
        if recipe is not None:
            model = flexify(model, [4], recipe=recipe, rank=2)  # type: ignore[arg-type]
            randomised(model, seed=1)
        return str(save_checkpoint(model, tmp_path / f"{recipe}{in_channels}.safetensors"))

    return make


def sample(line: str, out: Path) -> dict[str, Any]:
    assert main(["sample", *line.split(), "--out", str(out), "--device", "cpu"]) == 0
    return json.loads((out / "samples.json").read_text())


def latents_of(out: Path, prefix: str = "") -> Tensor:
    return load_file(out / f"{prefix}latents.safetensors")["latents"]


def test_one_schedule(checkpoint: Checkpoint, tmp_path: Path, capsys: Any) -> None:
    path, out = checkpoint(), tmp_path / "out"
    report = sample(f"{path} --classes 3,7 --num-per-class 3 --schedule 4:2,2:2", out)
    (entry,) = report["runs"]
    assert entry["files"] == [f"class-{label}_{index}.png" for label in (3, 7) for index in range(3)]
    assert {file.name for file in out.iterdir()} == {*entry["files"], "grid.png", "samples.json"}
    assert Image.open(out / "class-3_0.png").size == (8, 8)
    assert Image.open(out / "grid.png").height > 2 * 64
    cost = flops.schedule_cost(load_checkpoint(path), PatchSchedule.parse("4:2,2:2"))
    assert entry["relative_flops"] == round(cost.relative, 4)
    assert entry["gflops_per_image"] == round(cost.total / 1e9, 3)
    printed = capsys.readouterr().out
    assert f"{cost.relative:.1%} of the FLOPs" in printed and "images/s" in printed and str(out) in printed


def test_it_is_the_sampler_that_samples(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint()
    line = f"{path} --classes 3,7 --num-per-class 2 --schedule 4:2,2:2 --cfg-scale 2 --seed 5 --solver ddim --latents"
    sample(line, tmp_path / "out")
    sampler = Sampler(load_checkpoint(path), "ddim", schedule=PatchSchedule.parse("4:2,2:2"), cfg_scale=2.0)
    expected = sampler([3, 3, 7, 7], generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents_of(tmp_path / "out"), expected)


def test_the_report_is_enough_to_repeat_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = sample(f"{checkpoint()} --classes 1 --schedule 4:1,2:2 --guidance-channels 1 --seed 3", tmp_path / "a")
    arguments = first["arguments"]
    again = sample(
        f"{arguments['checkpoint']} --classes {arguments['classes']} --schedule {first['runs'][0]['schedule']} "
        f"--weak-guidance-scale {first['weak_guidance_scale']} --cfg-scale {first['cfg_scale']} "
        f"--guidance-channels {arguments['guidance_channels']} --seed {arguments['seed']}",
        tmp_path / "b",
    )
    assert again["model"] == first["model"]
    for file in first["runs"][0]["files"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = sample(f"{arguments['checkpoint']} --classes 1 --schedule 4:1,2:2 --seed 4", tmp_path / "c")
    assert (tmp_path / "a" / "grid.png").read_bytes() != (tmp_path / "c" / "grid.png").read_bytes()
    assert other["model"] == first["model"]


def test_several_budgets_start_from_the_same_noise(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint("lora")
    line = "--classes 0-2 --num-per-class 1 --steps 6 --latents"
    report = sample(f"{path} --budget 1.0,0.7 {line}", tmp_path / "both")
    expected = flops.schedule_for_budget(load_checkpoint(path), 0.7, 6, merged=False)
    assert [entry["schedule"] for entry in report["runs"]] == ["1x2x2:6", str(expected)]
    assert (tmp_path / "both" / "budget-0.7_class-2_0.png").is_file()
    for budget in ("1", "0.7"):  # alone or beside others: the same samples
        sample(f"{path} --budget {budget} {line}", tmp_path / budget)
        alone, beside = latents_of(tmp_path / budget), latents_of(tmp_path / "both", f"budget-{budget}_")
        assert torch.equal(alone, beside)


def test_batches_change_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    line = f"{checkpoint()} --classes 0-4 --num-per-class 1 --schedule 4:1,2:1 --latents"
    reports = [sample(f"{line} --batch-size {size}", tmp_path / str(size)) for size in (2, 5)]
    torch.testing.assert_close(latents_of(tmp_path / "2"), latents_of(tmp_path / "5"), atol=1e-4, rtol=1e-4)
    assert reports[0]["runs"][0]["gflops_per_image"] == reports[1]["runs"][0]["gflops_per_image"]


def test_merged_adapters_give_the_same_and_cost_less(checkpoint: Checkpoint, tmp_path: Path) -> None:
    line = f"{checkpoint('lora')} --classes 0,1 --schedule 4:2,2:1 --latents"
    plain, merged = sample(line, tmp_path / "a"), sample(f"{line} --merge", tmp_path / "b")
    torch.testing.assert_close(latents_of(tmp_path / "b"), latents_of(tmp_path / "a"), atol=1e-3, rtol=1e-3)
    assert merged["runs"][0]["relative_flops"] < plain["runs"][0]["relative_flops"]


def test_the_guiding_branch_can_be_weaker(checkpoint: Checkpoint, tmp_path: Path) -> None:
    line = f"{checkpoint()} --classes 0 --schedule 4:2,2:3 --guide-powerful-steps 1"
    assert sample(line, tmp_path)["runs"][0]["schedule"] == "1x4x4:2,1x2x2:3/1x4x4:4,1x2x2:1"


def test_latents_without_a_vae_and_pictures_with_one(checkpoint: Checkpoint, tiny_vae: Path, tmp_path: Path) -> None:
    line = f"{checkpoint(in_channels=4)} --classes 0,1 --num-per-class 2 --schedule 2:2"
    report = sample(f"{line} --latents", tmp_path / "latents")
    assert report["runs"][0]["files"] == ["latents.safetensors"] and report["codec"] is None
    assert latents_of(tmp_path / "latents").shape == (4, 4, 8, 8)
    assert not (tmp_path / "latents" / "grid.png").exists()
    report = sample(f"{line} --vae {tiny_vae}", tmp_path / "pictures")
    assert Image.open(tmp_path / "pictures" / "class-1_1.png").size == (32, 32)
    assert report["codec"]["class"] == "AutoencoderTiny"


def test_json_is_all_that_is_printed(checkpoint: Checkpoint, tmp_path: Path, capsys: Any) -> None:
    report = sample(f"{checkpoint()} --classes 0 --schedule 2:1 --json", tmp_path)
    assert json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("missing.safetensors --classes 1", "no checkpoint at missing.safetensors"),
        ("{shared} --classes 10", "class 10 is not one of the model's 10 classes, 0 to 9"),
        ("{shared} --classes one", "not a list of numbers"),
        ("{shared} --prompts four", "told classes, not captions; leave --prompts out"),
        ("{shared} --classes 1 --negative blurry", "leave --negative out"),
        ("{shared} --classes 1 --base other.safetensors", "holds a whole model"),
        ("{shared} --classes 1 --num-per-class 0", "must be at least 1"),
        ("{shared} --classes 1 --batch-size 0", "must be at least 1"),
        ("{shared} --classes 1 --budget 0.1", "these patch sizes allow 0."),
        ("{shared} --classes 1 --solver eluer", "unknown solver 'eluer'"),
        ("{shared} --classes 1 --solver euler", "solver 'euler' does not fit this model, which predicts noise"),
        ("{shared} --classes 1 --time-shift 3", "time_shift=3.0 is for models of a flow"),
        ("{shared} --classes 1 --schedule 8:1,2:1", "patch size 1x8x8, but the model has 1x2x2, 1x4x4"),
        ("{shared} --classes 1 --schedule 4:1,2:1 --steps 9", "leave --steps out"),
        ("{shared} --classes 1 --schedule 2:1,4:1 --guide-powerful-steps 1", "one weak stage and one powerful"),
        ("{shared} --classes 1 --schedule 2:2 --guide-powerful-steps 1", "one weak stage and one powerful"),
        ("{shared} --classes 1 --schedule 4:1,2:1,4:1 --guide-powerful-steps 1", "after a slash"),
        ("{shared} --classes 1 --schedule 4:1,2:1 --guide-powerful-steps 2", "never more powerful"),
        ("{shared} --classes 1 --schedule 2:1 --merge", "no adapters to merge"),
        ("{shared} --classes 1 --schedule 2:1 --guidance-channels 5", "between 1 and 1"),
        ("{plain} --classes 1 --budget 0.6", "no patch size but 1x2x2"),
        ("{latent} --classes 1 --schedule 2:1", "or --latents to save them as they are"),
    ],
)
def test_refusals(checkpoint: Checkpoint, line: str, sentence: str, tmp_path: Path, capsys: Any) -> None:
    places = {"shared": checkpoint(), "plain": checkpoint(None), "latent": checkpoint(in_channels=4)}
    assert main(["sample", *line.format(**places).split(), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_samples_that_are_no_numbers_are_refused(checkpoint: Checkpoint, tmp_path: Path, capsys: Any) -> None:
    model = load_checkpoint(checkpoint(None))
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(float("nan"))
    path = save_checkpoint(model, tmp_path / "broken.safetensors")
    assert main(f"sample {path} --classes 1 --schedule 2:1 --out {tmp_path / 'out'}".split()) == 2
    assert "NaN" in capsys.readouterr().err
