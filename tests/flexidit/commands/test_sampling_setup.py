from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from flexidit import PatchSchedule, create_model, save_checkpoint
from flexidit.commands import sampling_setup as setup
from flexidit.conditions import Captions
from flexidit.latents import PixelCodec
from flexidit.models.dit import DiT


@pytest.fixture
def model() -> DiT:
    return create_model("DiT-Tiny/2", input_size=8, num_classes=10, in_channels=1)


def load(line: str) -> setup.LoadedModel:
    parser = argparse.ArgumentParser()
    setup.add_model_arguments(parser)
    return setup.load_model(parser.parse_args(line.split()))


def test_a_model_is_named_by_its_weights(model: DiT, tmp_path: Path) -> None:
    first = load(str(save_checkpoint(model, tmp_path / "a.safetensors"))).name
    assert load(str(save_checkpoint(model, tmp_path / "b" / "a.safetensors"))).name == first
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] += 1e-7
    assert load(str(save_checkpoint(model, tmp_path / "a.safetensors"))).name != first
    assert setup.weights_digest(model.bfloat16()) not in first


def test_low_precision_is_autocast(model: DiT, tmp_path: Path) -> None:
    path = save_checkpoint(model.bfloat16(), tmp_path / "a.safetensors")
    plain, low = load(f"{path} --device cpu"), load(f"{path} --device cpu --dtype bfloat16")
    assert plain.precision == "float32" and plain.autocast is None
    assert low.precision == "bfloat16" and low.autocast == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in low.model.parameters())
    assert (plain.device_name, plain.model.training) == ("cpu", False)


def test_compiled_on_demand(model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: options.append(given))
    assert load(f"{save_checkpoint(model, tmp_path / 'a.safetensors')} --compile").is_compiled
    assert options == [{"dynamic": False}]


def test_warming_up_runs_each_kind_of_step_once(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    cpu, steps = torch.device("cpu"), PatchSchedule.parse("2:7")
    for is_compiled in (False, True):
        loaded = setup.LoadedModel(model, "", cpu, None, merged=False, is_compiled=is_compiled)
        setup.warm_up(loaded, steps, 3, cfg_scale=2.0)
    assert calls == [6]


def test_warming_up_a_flow_uses_one_of_its_solvers() -> None:
    times: list[torch.Tensor] = []
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10, process="flow", learn_sigma=False)
    model.register_forward_hook(lambda module, args, output: times.append(args[1]))
    loaded = setup.LoadedModel(model, "", torch.device("cpu"), None, merged=False, is_compiled=True)
    setup.warm_up(loaded, PatchSchedule.parse("2:3"), 1)
    assert [t.tolist() for t in times] == [[1000.0]]


@pytest.mark.parametrize("null_caption", [True, False])
def test_warming_up_makes_up_a_caption_or_takes_what_will_run(null_caption: bool) -> None:
    calls: list[int] = []
    model = create_model("TextDiT-Tiny/2", input_size=8, null_caption=null_caption)
    model.register_forward_hook(lambda module, args, output: calls.append(args[2].mask.shape[1]))
    loaded = setup.LoadedModel(model, "", torch.device("cpu"), None, merged=False, is_compiled=True)
    setup.warm_up(loaded, PatchSchedule.parse("2:2"), 3, cfg_scale=2.0)
    y = Captions(torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.bool))
    setup.warm_up(loaded, PatchSchedule.parse("2:2"), 3, y, y, cfg_scale=2.0)
    assert calls == [16, 5]


def test_latents_of_another_vae_are_told(tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of equal shape, it would decode without an error, to wrong pictures."""
    cpu, model = torch.device("cpu"), create_model("DiT-Tiny/2", input_size=8)
    codec = setup.pick_codec(model, str(tiny_vae), cpu)
    assert codec is not None
    for changed, message in (({}, ""), ({"weights_sha256": "0"}, "differ in weights_sha256")):
        checkpoint = {"flexidit": {"codec": {**codec.fingerprint, **changed}}}
        torch.save(checkpoint, tmp_path / "a.ckpt")
        recorded = setup._recorded_codec(str(tmp_path / "a.ckpt"))
        loaded = setup.LoadedModel(model, "", cpu, None, merged=False, is_compiled=False, latents=recorded)
        setup.warn_of_other_codec(loaded, codec)
        error = capsys.readouterr().err
        assert message in error and bool(error) == bool(message)


def test_codecs(model: DiT, tiny_vae: Path) -> None:
    cpu, latent_model = torch.device("cpu"), create_model("DiT-Tiny/2", input_size=8)
    assert isinstance(setup.pick_codec(model, None, cpu), PixelCodec)
    codec = setup.pick_codec(latent_model, str(tiny_vae), cpu)
    assert codec is not None and setup.need_codec(codec, latent_model).latent_channels == 4
    with pytest.raises(ValueError, match="4 channels, not pixels; give --vae"):
        setup.need_codec(setup.pick_codec(latent_model, None, cpu), latent_model)
    with pytest.raises(ValueError, match="latents of 4 channels and the model makes 1"):
        setup.pick_codec(model, str(tiny_vae), cpu)


def test_lists_of_numbers() -> None:
    assert setup.parse_numbers("3, 5-7", int, "--classes") == [3, 5, 6, 7]
    assert setup.parse_numbers("1e-1,0.5", float, "--budget") == [0.1, 0.5]
    for text in ("", "a", "1,,2", "7-5", "1.5", "1-"):
        with pytest.raises(ValueError, match=r"--classes .* not a list of numbers"):
            setup.parse_numbers(text, int, "--classes")
    with pytest.raises(ValueError, match="3 twice"):
        setup.parse_numbers("3,1-4", int, "--classes")


@pytest.mark.parametrize(("num_samples", "limit"), [(1, 32), (33, 32), (64, 32), (100, 7)])
def test_even_batches_are_as_few_as_possible(num_samples: int, limit: int) -> None:
    width = setup.even_batches(num_samples, limit)
    assert width <= limit and -(-num_samples // width) == -(-num_samples // limit)
    assert -(-num_samples // width) * width - num_samples < -(-num_samples // width)


def test_devices_that_are_not_there_are_refused() -> None:
    assert setup.pick_device("cpu").type == "cpu"
    for name in ("warp", "cuda:77"):
        with pytest.raises(ValueError, match="cannot be used here"):
            setup.pick_device(name)
