from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexidit import PatchSchedule, Sampler, create_model, flexify
from flexidit.models import Wan
from flexidit.pipelines import StockPipeline, boundary_ratio, pipeline_scheduler, save_wan_pipeline, two_stages
from flexidit.sampling.solvers import make_solver
from flexidit.text import TextEncoder

Randomise = Callable[..., nn.Module]
PROMPTS = ["A dog , Running", "a man on a red bicycle"]
CLIP: dict[str, Any] = {"num_frames": 13, "height": 64, "width": 64}  # of latents 4x8x8


@pytest.fixture
def student(randomised: Randomise) -> Wan:
    return make(randomised)


def make(randomised: Randomise, positions: str = "grid", **overrides: Any) -> Wan:
    shape = {"input_size": (4, 8, 8), "in_channels": 16, "caption_channels": 32, "caption_length": 24}
    target = create_model("Wan-Tiny", **{**shape, **overrides})
    randomised(target)
    weak: list[int | str] = ["2x2x2", "1x4x4", "2x4x4"]
    student = flexify(target, weak, recipe="lora", rank=2, positions=positions).eval()  # type: ignore[arg-type]
    randomised(student, seed=1)
    assert isinstance(student, Wan)
    return student


def export(student: Wan, wan_pipeline: Path, folder: Path, schedule: str = "2x2x2:3,1x2x2:2", **options: Any) -> Any:
    read = StockPipeline.read(wan_pipeline)
    scheduler = pipeline_scheduler(read, student.config, options.pop("solver", None), options.pop("time_shift", None))
    return save_wan_pipeline(student, folder, read, PatchSchedule.parse(schedule), scheduler=scheduler, **options)


def opened(folder: Path) -> Any:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise() -> Tensor:
    return torch.randn(2, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("schedule", ["2x2x2:3,1x2x2:2", "1x4x4:2,1x2x2:3", "2x4x4:1,1x4x4:4", "1x2x2:2,2x2x2:3"])
def test_a_stock_pipeline_gives_the_latents_of_our_sampler(
    schedule: str, student: Wan, wan_pipeline: Path, tmp_path: Path
) -> None:
    export(student, wan_pipeline, tmp_path / "out", schedule)
    pipeline = opened(tmp_path / "out")
    steps = len(PatchSchedule.parse(schedule))
    theirs = pipeline(
        PROMPTS, latents=noise(), num_inference_steps=steps, guidance_scale=3.0, guidance_scale_2=3.0,
        output_type="latent", max_sequence_length=24, **CLIP,
    ).frames  # fmt: skip
    encoder = TextEncoder(wan_pipeline, dtype="float32", max_length=24)
    for solver in (None, pipeline.scheduler):  # Wan's own by default
        sampler = Sampler(student, solver, schedule=PatchSchedule.parse(schedule), cfg_scale=3.0)
        ours = sampler(encoder.encode(PROMPTS), negative=encoder.encode([""]), noise=noise())
        torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=2e-4)
    assert ours.std() > 0.1


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_other_solvers_and_shifts_switch_where_the_schedule_does(
    solver: str, student: Wan, wan_pipeline: Path, tmp_path: Path
) -> None:
    export(student, wan_pipeline, tmp_path / "out", solver=solver, time_shift=7.0)
    pipeline, ran = opened(tmp_path / "out"), []
    for name in ("transformer", "transformer_2"):
        part = getattr(pipeline, name)
        part.register_forward_pre_hook(lambda module, arguments, name=name: ran.append(name))
    options = {"latents": noise(), "num_inference_steps": 5, "max_sequence_length": 24, **CLIP}
    theirs = pipeline(PROMPTS, guidance_scale=1.0, output_type="latent", **options).frames
    assert ran == ["transformer"] * 3 + ["transformer_2"] * 2
    sampler = Sampler(student, pipeline.scheduler, schedule=PatchSchedule.parse("2x2x2:3,1x2x2:2"))
    ours = sampler(TextEncoder(wan_pipeline, dtype="float32", max_length=24).encode(PROMPTS), noise=noise())
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=2e-4)
    config = pipeline.scheduler.config
    assert (config["shift"] if solver == "euler" else config["flow_shift"]) == 7


def test_the_pipeline_decodes_and_each_stage_has_its_scale(student: Wan, wan_pipeline: Path, tmp_path: Path) -> None:
    export(student, wan_pipeline, tmp_path / "out")
    pipeline, options = opened(tmp_path / "out"), {"num_inference_steps": 5, "max_sequence_length": 24, **CLIP}
    clips = [
        pipeline(PROMPTS[:1], latents=noise()[:1], guidance_scale=3.0, guidance_scale_2=scale, **options).frames
        for scale in (3.0, 6.0)
    ]
    assert clips[0].shape == (1, 13, 64, 64, 3)
    assert not torch.equal(*(torch.as_tensor(clip) for clip in clips))


@pytest.mark.parametrize("num_steps", [2, 5, 50])
@pytest.mark.parametrize("time_shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("name", ["unipc", "euler", "dpm++"])
def test_the_boundary_lies_between_the_stages(name: str, time_shift: float, num_steps: int) -> None:
    scheduler = make_solver(name, 1, process="flow", time_shift=time_shift)
    timesteps = make_solver(scheduler, num_steps, process="flow").timesteps
    for first_steps in {1, num_steps // 2, num_steps - 1}:
        in_first = timesteps >= boundary_ratio(scheduler, num_steps, first_steps) * 1000
        assert in_first.tolist() == [True] * first_steps + [False] * (num_steps - first_steps)


def test_no_boundary_lies_between_equal_times() -> None:
    scheduler = make_solver("unipc", 1, process="flow", time_shift=50.0)
    with pytest.raises(ValueError, match="the same time before and after step 1 of 900"):
        boundary_ratio(scheduler, 900, 1)


@pytest.mark.parametrize("link", [False, True])
def test_the_stock_pipeline_is_taken_over_and_left_as_it_is(
    link: bool, student: Wan, wan_pipeline: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in wan_pipeline.rglob("*") if path.is_file()}
    export(student, wan_pipeline, tmp_path / "out", link=link)
    assert {path: path.read_bytes() for path in wan_pipeline.rglob("*") if path.is_file()} == before
    parts = [tmp_path / "out" / name for name in ("vae", "text_encoder", "tokenizer")]
    assert all(part.is_symlink() == link and part.is_dir() for part in parts)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    assert 0 < index["boundary_ratio"] < 1 and index["vae"] == ["diffusers", "AutoencoderKLWan"]


@pytest.mark.parametrize("schedule", ["1x2x2:5", "2x2x2:2,1x4x4:2,1x2x2:1", "1x2x2:5/1x4x4:2,1x2x2:3"])
def test_schedules_that_stock_code_does_not_follow_are_refused(schedule: str) -> None:
    with pytest.raises(ValueError, match="switches once, between two patch sizes"):
        two_stages(PatchSchedule.parse(schedule))


@pytest.mark.parametrize(
    ("overrides", "schedule", "sentence"),
    [
        ({"positions": "coords"}, "2x2x2:3,1x2x2:2", "positions='grid'"),
        ({"input_size": (5, 8, 8)}, "2x2x2:3,1x2x2:2", "2x2x2 does not divide latent clips of 5x8x8"),
        ({"input_size": (4, 6, 8)}, "1x4x4:3,1x2x2:2", "1x4x4 does not divide latent clips of 4x6x8"),
        ({}, "4x4x4:3,1x2x2:2", "no patch size 4x4x4"),
        ({"in_channels": 4}, "2x2x2:3,1x2x2:2", "z_dim=16 and the model takes 4"),
        ({"caption_channels": 48}, "2x2x2:3,1x2x2:2", "d_model=32 and the model takes 48"),
    ],
)
def test_models_that_stock_code_cannot_run_are_refused(
    overrides: dict[str, Any], schedule: str, sentence: str, randomised: Randomise, wan_pipeline: Path, tmp_path: Path
) -> None:
    student = make(randomised, **overrides)
    with pytest.raises(ValueError, match=sentence):
        export(student, wan_pipeline, tmp_path / "out", schedule)
    assert not (tmp_path / "out").exists()


def test_other_families_and_folders_are_refused(student: Wan, wan_pipeline: Path, tmp_path: Path) -> None:
    video: Any = flexify(create_model("VideoDiT-Tiny", process="flow"), [4], recipe="lora", rank=2)
    with pytest.raises(ValueError, match="models of the family Wan, not a TextDiT"):
        export(video, wan_pipeline, tmp_path / "out", "1x4x4:3,1x2x2:2")
    for change, sentence in (
        ({"_class_name": "WanVACEPipeline"}, "is a WanVACEPipeline; give the folder of a WanPipeline"),
        ({"expand_timesteps": True}, "token by token"),
    ):
        index = json.loads((wan_pipeline / "model_index.json").read_text())
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=sentence):
            StockPipeline.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        StockPipeline.read(tmp_path / "absent")
    with pytest.raises(ValueError, match="is not empty"):
        export(student, wan_pipeline, tmp_path)
    with pytest.raises(ValueError, match="time shift is a number above 0"):
        export(student, wan_pipeline, tmp_path / "out", time_shift=-1.0)
