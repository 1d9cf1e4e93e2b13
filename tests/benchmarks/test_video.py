"""Latency and memory of models of clips: what the benchmarks say agrees with the models."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from flexidit import create_model, flexify
from flexidit.flops import forward_flops


def load(repository: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, repository / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rank", [None, 4])
def test_latency_is_told_beside_the_model_s_flops(repository: Path, tmp_path: Path, rank: int | None) -> None:
    options = ["--model", "Wan-Tiny", "--size", "5x16x16", "--depth", "1", "--ways", "eager", "--repetitions", "1"]
    adapters = [] if rank is None else ["--rank", str(rank)]
    out = tmp_path / "latency.json"
    load(repository, "video_latency").main([*options, *adapters, "--json", str(out)])
    record = json.loads(out.read_text())
    assert record["setting"]["size"] == "5x16x16"
    assert [m["num_tokens"] for m in record["measurements"]] == [320, 192, 80]  # five frames are three pairs
    student = flexify(create_model("Wan-Tiny", input_size=(5, 16, 16), depth=1), ["1x4x4", "2x2x2"], "lora", rank=4)
    for m in record["measurements"]:
        flops = forward_flops(student, m["patch_size"], merged=rank is None, captions="once")
        assert m["tflops"] == pytest.approx(flops / 1e12)
        assert 0 < m["fastest"] <= m["milliseconds"]
    assert record["measurements"][0]["relative_latency"] == 1


def test_memory_is_counted_off_the_model(repository: Path) -> None:
    benchmark = load(repository, "memory")
    memory_of, setting = benchmark.memory_of, benchmark.Setting("Wan-Tiny", ("1x4x4", "2x2x2"), 64)
    student = flexify(create_model("Wan-Tiny"), ["1x4x4", "2x2x2"], "lora", rank=64)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    in_blocks = sum(p.numel() for p in student.blocks.parameters() if p.requires_grad)
    alone, eight = memory_of(setting, 1), memory_of(setting, 8)
    assert (alone.weights, alone.trained, alone.gathered) == (4 * frozen, 20 * trained, 2 * in_blocks)
    assert (eight.weights, eight.trained) == (alone.weights / 8, alone.trained / 8)
    assert eight.activations == alone.activations
    assert memory_of(replace(setting, batch_size=3), 8).activations == 3 * eight.activations
    blocks = sum(p.numel() for p in student.blocks.parameters())
    wider = memory_of(replace(setting, gather="float32"), 8).gathered - eight.gathered
    assert wider == 2 * blocks + 2 * in_blocks  # both of its blocks, two bytes more each; autocast's copies
    kept = memory_of(replace(setting, checkpointing=False), 1).gathered
    assert kept == 2 * blocks  # backward needs the copies of frozen layers too


def test_all_weights_train_where_no_adapter_does(repository: Path) -> None:
    benchmark = load(repository, "memory")
    setting = benchmark.Setting("DiT-Tiny/2", ("4",), None, checkpointing=False)
    student = flexify(create_model("DiT-Tiny/2"), [4])
    memory = benchmark.memory_of(setting, 1)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    assert memory.weights == 4 * frozen
    assert memory.trained == 20 * sum(p.numel() for p in student.parameters() if p.requires_grad)
    recomputed = benchmark.memory_of(replace(setting, checkpointing=True), 1)
    assert recomputed.activations < memory.activations


@pytest.mark.parametrize(
    "name", ["imagenet/class_conditional_xl2", "text_to_image/pixart_256", "text_to_video/wan_14b"]
)
def test_settings_are_those_of_the_config(repository: Path, name: str) -> None:
    path = repository / "configs" / f"{name}.yaml"
    config = yaml.safe_load(path.read_text())
    setting = load(repository, "memory").Setting.read(path)
    assert setting.variant == config["model"]["init_args"]["target"]["variant"]
    assert (setting.rank is None) == (config["model"]["init_args"]["flex"].get("recipe") != "lora")
    assert setting.batch_size == config["data"]["init_args"]["batch_size"]


def test_a_step_without_data_takes_as_much_as_one_with_data(repository: Path) -> None:
    benchmark = load(repository, "memory")
    weak, rank, size = ("2x2x2",), 4, (5, 16, 16)
    student = flexify(create_model("Wan-Tiny", input_size=size), weak, "lora", rank=rank)
    student.gradient_checkpointing = True
    student.blocks.to(torch.bfloat16)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    real = benchmark.height_of_a_step(student, student.patch_sizes[1])
    setting = benchmark.Setting("Wan-Tiny", weak, rank, size=size)
    assert benchmark.activations_of(setting) == pytest.approx(real, rel=0.02)


def test_live_bytes_are_those_of_storages_that_are_held(repository: Path) -> None:
    known = torch.zeros(1000)
    with load(repository, "memory").LiveBytes([known]) as live:
        held = known + 1  # 4000 bytes
        view = held.view(10, 100)  # none
        assert (live.live, live.peak) == (4000, 4000)
        passing = view * 2
        del passing
        assert (live.live, live.peak) == (4000, 8000)
        known.add_(1)
        assert live.peak == 8000
