"""``flexidit sample`` of models that are told captions."""

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
from flexidit.config import config_to_dict
from flexidit.models import TextDiT
from flexidit.text import WordEncoder

Randomise = Callable[..., nn.Module]
WORDS = WordEncoder(width=64, max_length=8, seed=3)
PROMPTS = ("a bold seven leaning right", "an upright thin two")
ASKED = ["--prompts", ";".join(PROMPTS)]


def make(randomised: Randomise, **config: Any) -> TextDiT:
    options = {"input_size": 8, "in_channels": 1, "caption_length": 8, **config}
    target = create_model("TextDiT-Tiny/2", **options)
    randomised(target)
    student = flexify(target, [4], recipe="lora", rank=2)
    randomised(student, seed=1)
    assert isinstance(student, TextDiT)
    return student


@pytest.fixture
def student(randomised: Randomise) -> TextDiT:
    return make(randomised)


@pytest.fixture
def path(student: TextDiT, tmp_path: Path) -> Path:
    """A training checkpoint whose captions were embedded by ``WORDS``."""
    return save_training(student, tmp_path / "last.ckpt", WORDS.fingerprint)


def save_training(student: TextDiT, path: Path, text: dict[str, Any] | None) -> Path:
    state = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    said = {"config": config_to_dict(student.config), "base": None, "text": text}
    torch.save({"state_dict": state, "flexidit": said}, path)
    return path


def sample(*arguments: object, out: Path) -> dict[str, Any]:
    assert main(["sample", *map(str, arguments), "--out", str(out), "--device", "cpu"]) == 0
    return json.loads((out / "samples.json").read_text())


def latents_of(out: Path) -> Tensor:
    return load_file(out / "latents.safetensors")["latents"]


def test_pictures_and_what_they_cost(path: Path, student: TextDiT, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    report = sample(path, *ASKED, "--num-per-prompt", 2, "--schedule", "4:2,2:2", out=out)
    (entry,) = report["runs"]
    assert entry["files"] == ["prompt-0_0.png", "prompt-0_1.png", "prompt-1_0.png", "prompt-1_1.png"]
    assert Image.open(out / "prompt-1_0.png").size == (8, 8) and (out / "grid.png").is_file()
    schedule = PatchSchedule.parse("4:2,2:2")
    paper, ran = (flops.schedule_cost(student, schedule, merged=False, captions=w) for w in ("every_step", "once"))
    assert entry["relative_flops"] == round(paper.relative, 4)
    assert entry["gflops_per_image"] == round(paper.total / 1e9, 3)
    assert entry["captions_once"]["relative_flops"] == round(ran.relative, 4) < entry["relative_flops"]
    assert entry["captions_once"]["gflops_per_image"] == round(ran.total / 1e9, 3) < entry["gflops_per_image"]
    assert report["prompts"] == list(PROMPTS) and report["negative"] is None and not report["merged"]
    assert report["text_encoder"] == WORDS.fingerprint and report["captions_counted"] == "every_step"
    assert "as it ran, captions computed once" in capsys.readouterr().out


def test_it_is_the_sampler_that_samples(path: Path, tmp_path: Path) -> None:
    line = "--num-per-prompt 2 --schedule 4:2,2:2 --cfg-scale 2 --seed 5 --solver ddim --latents"
    sample(path, *ASKED, "--negative", "a thin one", *line.split(), out=tmp_path / "out")
    sampler = Sampler(load_checkpoint(path), "ddim", schedule=PatchSchedule.parse("4:2,2:2"), cfg_scale=2.0)
    y = WORDS.encode([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    expected = sampler(y, negative=WORDS.encode(["a thin one"]), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents_of(tmp_path / "out"), expected)


def test_prompts_from_a_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(["", *PROMPTS, ""]))
    options = ["--num-per-prompt", 1, "--schedule", "2:2", "--latents"]
    report = sample(path, "--prompt-file", tmp_path / "prompts.txt", *options, out=tmp_path / "a")
    assert report["prompts"] == list(PROMPTS)
    sample(path, *ASKED, *options, out=tmp_path / "b")
    assert torch.equal(latents_of(tmp_path / "a"), latents_of(tmp_path / "b"))


def test_several_budgets_have_a_column_each(path: Path, tmp_path: Path) -> None:
    report = sample(path, *ASKED, "--num-per-prompt", 1, "--budget", "1.0,0.8", "--steps", 4, out=tmp_path / "out")
    assert [entry["budget"] for entry in report["runs"]] == [1.0, 0.8]
    assert (tmp_path / "out" / "budget-0.8_prompt-1_0.png").is_file()
    width, height = Image.open(tmp_path / "out" / "grid.png").size
    assert width > 2 * 64 and height > 2 * 64


def test_merged_adapters_give_the_same_and_cost_less(path: Path, tmp_path: Path) -> None:
    options = [*ASKED, "--num-per-prompt", 1, "--schedule", "4:2,2:1", "--solver", "ddim", "--latents"]
    plain, merged = sample(path, *options, out=tmp_path / "a"), sample(path, *options, "--merge", out=tmp_path / "b")
    torch.testing.assert_close(latents_of(tmp_path / "b"), latents_of(tmp_path / "a"), atol=1e-2, rtol=1e-3)
    assert merged["merged"] and merged["runs"][0]["relative_flops"] < plain["runs"][0]["relative_flops"]


def test_adapters_take_the_base_that_is_given(student: TextDiT, path: Path, tmp_path: Path) -> None:
    base = save_checkpoint(student, tmp_path / "base.safetensors")  # a whole student holds its base
    adapters = save_checkpoint(student, tmp_path / "adapters.safetensors", adapters_only=True)
    options = [*ASKED, "--num-per-prompt", 1, "--schedule", "4:1,2:1", "--latents"]
    sample(adapters, "--base", base, "--text-encoder", "words:64x8", *options, out=tmp_path / "a")
    seeded = WordEncoder(64, 8)  # another than that of training
    report = sample(path, "--text-encoder", "words:64x8", *options, out=tmp_path / "b")
    assert report["text_encoder"] == seeded.fingerprint
    assert torch.equal(latents_of(tmp_path / "a"), latents_of(tmp_path / "b"))


def test_weights_without_a_null_caption_are_guided_away_from_the_empty_prompt(
    randomised: Randomise, tmp_path: Path
) -> None:
    path = save_training(make(randomised, null_caption=False), tmp_path / "last.ckpt", WORDS.fingerprint)
    options = [*ASKED, "--num-per-prompt", 1, "--schedule", "2:2", "--latents"]
    report = sample(path, *options, out=tmp_path / "a")
    assert report["negative"] == ""
    sample(path, *options, "--negative", "", out=tmp_path / "b")
    assert torch.equal(latents_of(tmp_path / "a"), latents_of(tmp_path / "b"))


def test_a_t5_beside_its_tokenizer(randomised: Randomise, t5: Path, tmp_path: Path) -> None:
    model = make(randomised, caption_channels=32)
    path = save_checkpoint(model, tmp_path / "student.safetensors")
    options = ["--prompts", "a dog;a man on red bicycle", "--num-per-prompt", 1, "--schedule", "4:1,2:1"]
    report = sample(path, *options, "--text-encoder", t5, out=tmp_path / "out")
    assert report["text_encoder"]["class"] == "T5EncoderModel" and report["text_encoder"]["max_length"] == 8


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--classes 1", "told captions, not classes; give --prompts or --prompt-file"),
        ("--prompts ;", "--prompts holds no prompt"),
        ("--prompt-file missing.txt", "no prompts at missing.txt"),
        ("--prompts four --num-per-prompt 0", "must be at least 1"),
        ("--prompts four --text-encoder words:32x8", "embeddings of width 32 and the model reads 64"),
        ("--prompts four --text-encoder words:64x20", "captions of 20 tokens and the model reads 8"),
        ("--prompts four --text-encoder ./nowhere", "no T5 text encoder at ./nowhere"),
        ("--prompts four --schedule 8:1", "uses patch size 1x8x8"),
    ],
)
def test_refusals(path: Path, line: str, sentence: str, tmp_path: Path, capsys: Any) -> None:
    schedule = [] if "--schedule" in line else ["--schedule", "2:1"]
    assert main(["sample", str(path), *line.split(), *schedule, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_too_long_are_named(path: Path, tmp_path: Path, capsys: Any) -> None:
    long = "the digit nine bold and wide and leaning to the right"
    sample(path, "--prompts", f"a nine;{long}", "--num-per-prompt", 1, "--schedule", "2:1", out=tmp_path / "out")
    assert capsys.readouterr().err == f"warning: only the first 8 tokens are read of: {long}\n"
