"""``flexidit sample`` of models of clips."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from flexidit import PatchSchedule, Sampler, create_model, flexify, flops, load_checkpoint, save_checkpoint
from flexidit.cli import main
from flexidit.commands.vbench_layout import DIMENSIONS
from flexidit.config import config_to_dict
from flexidit.text import WordEncoder

WORDS = WordEncoder(width=64, max_length=8, seed=3)
PROMPTS = ("a bold seven moving left", "an upright thin two moving up")
ASKED = ["--prompts", ";".join(PROMPTS)]
MIXTURE = "1x4x4:2,2x2x2:1,1x2x2:1"


@pytest.fixture
def checkpoint(randomised: Callable[..., nn.Module], tmp_path: Path) -> Callable[..., Path]:
    """A training checkpoint of a random model of clips of 5 frames of 8x8, with two weak modes."""

    def make(**config: Any) -> Path:
        options = {"input_size": (5, 8, 8), "caption_length": 8, "depth": 1, "hidden_size": 32, **config}
        student = flexify(randomised(create_model("VideoDiT-Tiny", **options)), ["1x4x4", "2x2x2"], "lora", rank=2)
        randomised(student, seed=1)
        state = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
        said = {"config": config_to_dict(student.config), "base": None, "text": WORDS.fingerprint}
        torch.save({"state_dict": state, "flexidit": said}, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return make


def sample(*arguments: object, out: Path) -> dict[str, Any]:
    assert main(["sample", *map(str, arguments), "--out", str(out), "--device", "cpu"]) == 0
    return json.loads((out / "samples.json").read_text())


def latents_of(out: Path, prefix: str = "") -> Tensor:
    return load_file(out / f"{prefix}latents.safetensors")["latents"]


def num_frames(path: Path) -> int:
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


def test_clips_and_what_they_cost(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    path, out = checkpoint(), tmp_path / "out"
    report = sample(path, *ASKED, "--num-per-prompt", 2, "--schedule", MIXTURE, "--fps", 12, out=out)
    (entry,) = report["runs"]
    stems = [f"prompt-{prompt}_{index}" for prompt in range(2) for index in range(2)]
    assert entry["files"] == [f"{stem}.{suffix}" for stem in stems for suffix in ("mp4", "gif")]
    assert {file.name for file in out.iterdir()} == {*entry["files"], "contact_sheet.png", "samples.json"}
    assert num_frames(out / "prompt-1_0.mp4") == Image.open(out / "prompt-1_0.gif").n_frames == 5
    assert Image.open(out / "prompt-1_0.gif").size == (8, 8) and report["fps"] == 12
    cost = flops.schedule_cost(load_checkpoint(path), PatchSchedule.parse(MIXTURE), merged=False)
    assert entry["gflops_per_clip"] == round(cost.total / 1e9, 3)
    assert entry["relative_flops"] == round(cost.relative, 4)
    assert entry["seconds_per_clip"] == pytest.approx(1 / entry["clips_per_second"])
    printed = capsys.readouterr().out
    assert "s a clip" in printed and "clips/s" in printed and "image" not in printed
    assert not any("image" in name for name in entry)


def test_it_is_the_sampler_that_samples_whatever_the_batches(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint()
    line = f"--num-per-prompt 2 --schedule {MIXTURE} --cfg-scale 2 --seed 5 --latents".split()
    sampler = Sampler(load_checkpoint(path), schedule=PatchSchedule.parse(MIXTURE), cfg_scale=2.0)
    y = WORDS.encode([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    expected = sampler(y, generator=torch.Generator().manual_seed(5))
    for batch_size in (1, 3, 4):
        sample(path, *ASKED, *line, "--batch-size", batch_size, out=tmp_path / str(batch_size))
        found = latents_of(tmp_path / str(batch_size))
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def test_budgets_stand_below_one_another(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    line = ["--num-per-prompt", "1", "--budget", "1.0,0.7", "--weak", "2x2x2", "--steps", "4", "--clip-format", "gif"]
    report = sample(checkpoint(), *ASKED, *line, out=tmp_path)
    assert [entry["budget"] for entry in report["runs"]] == [1.0, 0.7]
    assert report["runs"][1]["files"] == ["budget-0.7_prompt-0_0.gif", "budget-0.7_prompt-1_0.gif"]
    assert "2x2x2" in report["runs"][1]["schedule"]
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.height > 4 * 64 and sheet.width > 5 * 64


def test_a_sheet_of_many_prompts_stays_a_sheet(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    prompts = ";".join(f"a bold seven moving left {number}" for number in range(40))
    line = ["--num-per-prompt", "2", "--schedule", "1x4x4:1", "--clip-format", "gif", "--cfg-scale", "1"]
    report = sample(checkpoint(), "--prompts", prompts, *line, out=tmp_path)
    assert len(report["runs"][0]["files"]) == 80
    assert Image.open(tmp_path / "contact_sheet.png").height < 34 * 70


@pytest.mark.parametrize(("option", "size"), [(["--size", "3x8x12"], (3, 8, 12)), (["--frames", "7"], (7, 8, 8))])
def test_other_latent_sizes(
    checkpoint: Callable[..., Path], option: list[str], size: tuple[int, ...], tmp_path: Path
) -> None:
    path, out = checkpoint(), tmp_path / "out"
    line = ["--num-per-prompt", "1", "--budget", "0.7", "--steps", "6", "--latents", "--cfg-scale", "1"]
    report = sample(path, *ASKED, *line, *option, out=out)
    (entry,) = report["runs"]
    assert latents_of(out).shape == (2, 1, *size) and report["latent_size"] == list(size)
    assert num_frames(out / "prompt-0_0.mp4") == size[0]
    model, schedule = load_checkpoint(path), PatchSchedule.parse(entry["schedule"])
    cost = flops.schedule_cost(model, schedule, guided=False, size=size, merged=False)
    assert entry["gflops_per_clip"] == round(cost.total / 1e9, 3)
    assert schedule == flops.schedule_for_budget(model, 0.7, 6, size=size, merged=False)


def test_a_vae_decodes_clips(checkpoint: Callable[..., Path], wan_vae: Path, tmp_path: Path) -> None:
    path = checkpoint(in_channels=4, input_size=(2, 8, 8))
    report = sample(path, *ASKED, "--schedule", "2:1", "--vae", wan_vae, "--num-per-prompt", 1, out=tmp_path / "out")
    assert num_frames(tmp_path / "out" / "prompt-0_0.mp4") == 5 and report["codec"]["class"] == "AutoencoderKLWan"
    assert Image.open(tmp_path / "out" / "prompt-0_0.gif").size == (32, 32)
    assert report["runs"][0]["decoding_seconds_per_clip"] > 0


def test_the_layout_of_vbench(checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("a known prompt\nblack/white\na known prompt\n")
    line = ["--layout", "vbench", "--budget", "1.0,0.8", "--steps", "4", "--batch-size", "8"]
    report = sample(checkpoint(), "--prompt-file", tmp_path / "prompts.txt", *line, out=tmp_path / "out")
    names = [f"{name}-{index}.mp4" for name in ("a known prompt", "black_white (1)") for index in range(5)]
    for folder, entry in zip(("budget-1_clips", "budget-0.8_clips"), report["runs"], strict=True):
        assert sorted(file.name for file in (tmp_path / "out" / folder).iterdir()) == sorted(names)
        assert entry["files"] == [f"{folder}/{name}" for name in names]
    asked = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert list(asked) == names and asked[names[-1]] == "black/white"
    script = tmp_path / "out" / "vbench.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert all(name in script.read_text() for name in (*DIMENSIONS, "budget-1_clips", "budget-0.8_clips"))
    assert f"bash {script}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--clip-format webm", "not a list of mp4, gif"),
        ("--fps 0", "between 0 and 1000"),
        ("--size 8x8", "give FxHxW"),
        ("--frames 0", "at least 1"),
        ("--size 5x8x8 --frames 3", "without --size"),
        ("--layout vbench --clip-format gif", "leave --clip-format gif out"),
    ],
)
def test_refusals(checkpoint: Callable[..., Path], line: str, sentence: str, tmp_path: Path, capsys: Any) -> None:
    out = ["--schedule", "2:1", "--out", str(tmp_path / "out")]
    assert main(["sample", str(checkpoint()), *ASKED, *line.split(), *out]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["--fps 8", "--clip-format mp4", "--layout vbench"])
def test_options_of_clips_are_not_for_images(line: str, tmp_path: Path, capsys: Any) -> None:
    path = save_checkpoint(create_model("DiT-Tiny/2", input_size=8, in_channels=1), tmp_path / "model.safetensors")
    out = ["--classes", "1", "--schedule", "2:1", "--out", str(tmp_path / "out")]
    assert main(["sample", str(path), *out, *line.split()]) == 2
    assert f"images, not clips; leave {line.split()[0]} out" in capsys.readouterr().err


def test_images_of_other_sizes(randomised: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = randomised(create_model("DiT-Tiny/2", input_size=8, in_channels=1))
    path = save_checkpoint(model, tmp_path / "model.safetensors")  # type: ignore[arg-type]
    report = sample(path, "--classes", "1,2", "--schedule", "2:1", "--size", "6x12", out=tmp_path / "out")
    assert Image.open(tmp_path / "out" / "class-2_0.png").size == (12, 6) and report["latent_size"] == [6, 12]
