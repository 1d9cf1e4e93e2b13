"""What ``sample`` and ``curve`` share: the model as it will run, its codec, its name, and a bar with the time left."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from flexidit.conditions import Captions
from flexidit.config import CaptionedConfig, config_to_dict
from flexidit.latents import LatentCodec, PixelCodec
from flexidit.patch_size import PatchSize
from flexidit.sampling.denoiser import process_of
from flexidit.sampling.sampler import Sampler
from flexidit.sampling.schedule import PatchSchedule, ScheduleStep
from flexidit.sampling.solvers import FLOW_SOLVERS, SOLVERS

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer

DTYPES = ("float32", "bfloat16", "float16")

Codec = LatentCodec | PixelCodec
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, and how it will run."""

    model: Any
    """A ``FlexiTransformer``, or a ``MergedModel`` of one."""
    name: str
    """File name and digest of the weights: what identifies the model in records."""
    device: torch.device
    autocast: torch.dtype | None
    """Type that the model runs in; None: that of its parameters, float32."""
    merged: bool
    """Whether adapters are merged, where they cost nothing."""
    is_compiled: bool
    text: Mapping[str, Any] | None = None
    """Fingerprint of the text encoder that it was trained with, where the checkpoint says so."""
    latents: Mapping[str, Any] | None = None
    """Fingerprint of the VAE that made the latents it was trained on, where the checkpoint says so."""

    @property
    def precision(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return str(self.autocast or torch.float32).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """The device as a record of times needs it."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what says which model runs, and how."""
    parser.add_argument("checkpoint", help="flexidit, official or diffusers weights, a training .ckpt, or a hub id")
    parser.add_argument(
        "--base", metavar="PATH", help="weights that adapters stand on (default: where training had it)"
    )
    parser.add_argument("--no-ema", action="store_true", help="not the averaged weights where a checkpoint has both")
    parser.add_argument("--num-heads", type=int, metavar="N", help="of official weights of no published width")
    parser.add_argument("--vae", help="folder or hub id of the VAE that decodes; not needed for models of pixels")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="the model runs in (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, one graph per patch size")
    parser.add_argument("--merge", action="store_true", help="merge adapters first (recipe lora): faster, more memory")


def add_solver_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what says how predictions become steps."""
    parser.add_argument(
        "--solver",
        metavar="NAME",
        help=f"{_listed(SOLVERS)} (default: {SOLVERS[0]}); flow models: {_listed(FLOW_SOLVERS)} "
        f"(default: {FLOW_SOLVERS[0]})",
    )
    parser.add_argument(
        "--time-shift", type=float, metavar="X", help="of a flow's noise levels (default: that of training)"
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def load_model(args: argparse.Namespace) -> LoadedModel:
    """The model that the arguments name, ready to run.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used.
    """
    device = pick_device(args.device)
    from flexidit.checkpoint import recorded_text  # brings timm, which --help need not wait for

    loaded = read_checkpoint(args.checkpoint, prefer_ema=not args.no_ema, num_heads=args.num_heads, base=args.base)
    name = f"{Path(args.checkpoint).name} {weights_digest(loaded)}"
    model: nn.Module = loaded.float().requires_grad_(False)
    if args.merge:
        from flexidit.merged import MergedModel

        model = MergedModel(loaded)
    model = model.to(device).eval()
    if args.compile:
        model.compile(dynamic=False)
    autocast = None if args.dtype == "float32" else getattr(torch, args.dtype)
    text = recorded_text(args.checkpoint) if isinstance(loaded.config, CaptionedConfig) else None
    kind = {"merged": args.merge, "is_compiled": args.compile}
    return LoadedModel(model, name, device, autocast, **kind, text=text, latents=_recorded_codec(args.checkpoint))


def _recorded_codec(path: str) -> Mapping[str, Any] | None:
    """What a training checkpoint says of the VAE behind its latents."""
    from flexidit.sharded_files import EXTRA, is_sharded
    from flexidit.weight_files import load_pickle

    file = Path(path) / EXTRA if is_sharded(Path(path)) else Path(path)
    if not (file.is_file() and (file.suffix == ".ckpt" or file.name == EXTRA)):
        return None
    return load_pickle(file, check_bytes=False).get("flexidit", {}).get("codec")


def warn_of_other_codec(loaded: LoadedModel, codec: Codec | None) -> None:
    """Say on standard error that the model's latents are not those of this VAE."""
    if loaded.latents is not None and codec is not None:
        from flexidit.fingerprints import fingerprint_differences

        differing = fingerprint_differences(loaded.latents, codec.fingerprint)
        if differing:
            print(
                f"warning: the model was trained on latents of another VAE (they differ in {', '.join(differing)}); "
                "expect wrong colours or worse",
                file=sys.stderr,
            )


def read_checkpoint(path: str, *, prefer_ema: bool, num_heads: int | None, base: str | None = None) -> FlexiTransformer:
    """:func:`load_checkpoint`, which must agree with a number of heads that was given.

    Raises:
        ValueError: the checkpoint says another number.
    """
    from flexidit.checkpoint import load_checkpoint  # brings timm, which --help need not wait for

    told = {} if num_heads is None else {"num_heads": num_heads}
    model = load_checkpoint(path, base, prefer_ema=prefer_ema, **told)
    if num_heads not in (None, model.config.num_heads):
        raise ValueError(f"{path} says num_heads={model.config.num_heads}, not {num_heads}; leave --num-heads out")
    return model


def weights_digest(model: FlexiTransformer) -> str:
    """Twelve hexadecimal digits that change with the config and with any weight."""
    digest = hashlib.sha256(json.dumps(config_to_dict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one.

    Raises:
        ValueError: the device cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # torch raises AssertionError for cuda without a driver, RuntimeError for names it does not know
    except (AssertionError, RuntimeError, ImportError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error


def pick_codec(model: Any, vae: str | None, device: torch.device) -> Codec | None:
    """What turns the model's samples into pixels; None where nothing here can.

    Raises:
        ValueError: the VAE is not one of this model.
    """
    if vae is None:
        return PixelCodec(model.in_channels) if model.in_channels in (1, 3) else None
    codec = LatentCodec(vae, device=device, batch_size=4 if device.type == "cpu" else 32)
    if codec.latent_channels != model.in_channels:
        raise ValueError(
            f"the VAE {vae} has latents of {codec.latent_channels} channels and the model makes {model.in_channels}; "
            "give the VAE that the model was trained with, or none for a model of pixels"
        )
    return codec


def need_codec(codec: Codec | None, model: Any, otherwise: str = "") -> Codec:
    """The codec.

    Raises:
        ValueError: there is none.
    """
    if codec is None:
        raise ValueError(
            f"this model makes latents of {model.in_channels} channels, not pixels; give --vae, the folder or hub id "
            f"of the VAE it was trained with{otherwise}"
        )
    return codec


def parse_numbers(text: str, kind: type[Number], option: str) -> list[Number]:
    """Different numbers, separated by commas; for whole numbers ``0-9`` is a range.

    Raises:
        ValueError: the text is something else, or says a number twice.

    Example:
        >>> parse_numbers("207,0-2", int, "--classes"), parse_numbers("1.0,0.6", float, "--budget")
        ([207, 0, 1, 2], [1.0, 0.6])
    """
    try:
        numbers = [number for field in text.split(",") for number in _numbers(field, kind)]
    except ValueError:
        example = "207,360 or 0-9" if kind is int else "1.0,0.6"
        raise ValueError(f"{option} {text!r} is not a list of numbers; write it as {example}") from None
    for number in numbers:
        if numbers.count(number) > 1:
            raise ValueError(f"{option} {text!r} has {number} twice")
    return numbers


def _numbers(field: str, kind: type[Number]) -> Iterable[Number]:
    first, dash, last = field.strip().partition("-")
    if kind is int and first and dash:
        if int(last) < int(first):
            raise ValueError(field)
        return [kind(number) for number in range(int(first), int(last) + 1)]
    return [kind(field)]


def even_batches(num_samples: int, limit: int) -> int:
    """Largest batch size up to ``limit`` that wastes least: the last batch is filled up with copies.

    Example:
        >>> even_batches(33, 32), even_batches(8, 32)
        (17, 8)
    """
    return math.ceil(num_samples / math.ceil(num_samples / limit))


def warm_up(
    loaded: LoadedModel,
    steps: Iterable[ScheduleStep],
    batch_size: int,
    y: Tensor | Captions | None = None,
    negative: Tensor | Captions | None = None,
    size: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """Run each kind of step once where the first run is slower: compilation and CUDA's start must not be timed.

    Args:
        loaded: The model.
        steps: The steps that will run; equal ones count once.
        batch_size: Samples in one forward pass.
        y: What the model is told, of which the first is taken; None: class 0, or a made-up caption of full length.
        negative: As the sampler takes it, of which the first is taken.
        size: Latent size; None: the model's.
        **options: Guidance, as :class:`Sampler` takes it.
    """
    if not loaded.is_compiled and loaded.device.type == "cpu":
        return
    first = torch.zeros(batch_size, dtype=torch.long)
    if y is None:
        y, negative = _made_up(loaded.model)
    solver = "euler" if process_of(loaded.model) == "flow" else "ddim"  # any number of steps will do
    sampler = Sampler(
        loaded.model, solver, schedule=PatchSchedule(tuple(dict.fromkeys(steps))), autocast=loaded.autocast, **options
    )
    away = None if negative is None else negative[:1]
    sampler(y[first], negative=away, generator=torch.Generator().manual_seed(0), size=size)


def _made_up(model: Any) -> tuple[Tensor | Captions, Captions | None]:
    """A condition that the model can be told, and what to guide away from where it has no null caption."""
    config = model.config
    if not isinstance(config, CaptionedConfig):
        return torch.zeros(1, dtype=torch.long), None
    shape = (1, config.caption_length)
    y = Captions(torch.zeros(*shape, config.caption_channels), torch.ones(shape, dtype=torch.bool))
    return y, None if config.has_null_caption else y


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def step_flops(step: ScheduleStep, costs: dict[PatchSize, int], guided: bool) -> int:
    """Cost of one step of one sample."""
    return costs[step.cond] + (costs[step.guide] if guided else 0)


@contextmanager
def progress_bar(text: str, total: float, enabled: bool = True) -> Iterator[Callable[[float], None]]:
    """A bar on standard error with the time left; yields a function that moves it forward.

    Count FLOPs, not steps: weak steps pass quickly, and the time left would be wrong at every switch.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task(text, total=total)
        yield lambda amount: bar.advance(task, amount)
