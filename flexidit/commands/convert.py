"""``flexidit convert``: weights from any layout to any other, one patch size of a flexible model, or its adapters."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexidit.commands.convert_pipeline import (
    PIPELINE,
    add_pipeline_arguments,
    check_pipeline_arguments,
    convert_pipeline,
)
from flexidit.commands.convert_report import compare, describe, facts_of, make_report, times
from flexidit.config import family_of

if TYPE_CHECKING:
    from flexidit.checkpoint import Weights
    from flexidit.export import Adapters
    from flexidit.models import FlexiTransformer

HELP = "official, diffusers, flexidit and training checkpoints to one another; one patch size; adapters; a pipeline"
EXAMPLE = """flexidit convert last.ckpt adapters --to peft --base PixArt-XL-2-256x256.pth
  flexidit convert adapters PixArt-XL-4 --to merged --patch-size 4 --base PixArt-XL-2-256x256.pth
  flexidit convert student.safetensors DiT-XL-4 --to diffusers --patch-size 4
  flexidit convert adapters Wan-fast --to wan-pipeline --pipeline Wan2.1-Diffusers --schedule 1x4x4:30,1x2x2:20"""

_SUFFIXES = {"flexidit": (".safetensors",), "official": (".pt", ".pth", ".safetensors")}
_LAYOUTS = {
    "flexidit": "flexidit",
    "official": "official",
    "diffusers": "diffusers",
    "merged": "diffusers",  # of a weak patch size
    "peft": "peft",
    PIPELINE: PIPELINE,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "input", help="flexidit, official or diffusers weights, a training .ckpt, adapters, or a hub id"
    )
    parser.add_argument(
        "output",
        type=Path,
        help=".safetensors (flexidit), .pt or .safetensors (official) or folder (all others)",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=_LAYOUTS,
        help="layout to write; merged: a weak patch size for diffusers; peft: adapters for diffusers' class; "
        f"{PIPELINE}: a folder that diffusers' WanPipeline opens",
    )
    parser.add_argument(
        "--patch-size", metavar="SIZE", help="write a plain model of this size: adapters merged, weights projected"
    )
    parser.add_argument(
        "--base", metavar="PATH", help="what adapters stand on, if not where training had it; a file, folder or hub id"
    )
    parser.add_argument("--adapters-only", action="store_true", help="flexidit layout without the base (recipe lora)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="write in this precision (default: as stored)"
    )
    parser.add_argument("--no-ema", action="store_true", help="not the averaged weights where a checkpoint has both")
    parser.add_argument("--num-heads", type=int, metavar="N", help="of official weights of no published width")
    parser.add_argument(
        "--input-size",
        type=_latent_size,
        metavar="SIZE",
        help="latent N or HxW, of official PixArt weights without pos_embed; FxHxW of the clips that a Wan is for",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_pipeline_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read, write, read back and compare.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used or layouts that cannot hold it.
    """
    from flexidit.checkpoint import read_any
    from flexidit.export import Adapters

    _check_arguments(args)
    _check_not_overwritten(args.output, args.input, args.base, args.pipeline)
    found = read_any(args.input, prefer_ema=not args.no_ema, num_heads=args.num_heads, input_size=args.input_size)
    if args.num_heads not in (None, found.config.num_heads):
        raise ValueError(
            f"{args.input} says num_heads={found.config.num_heads}, not {args.num_heads}; leave --num-heads out"
        )
    if _wants_adapters(args) or isinstance(found, Adapters):
        _check_not_overwritten(args.output, *_recorded_base(found, args.input))
    result = _convert(found, args)
    if result["warning"]:
        print(f"flexidit convert: {result['warning']}", file=sys.stderr)
    print(json.dumps(result) if args.json else describe(result))
    return 0


def _latent_size(text: str) -> int | tuple[int, ...]:
    """``"64"``, ``"64x96"`` or ``"21x60x104"``."""
    sides = tuple(int(side) if side.isdecimal() else 0 for side in text.split("x"))
    if not all(sides) or len(sides) > 3:
        raise argparse.ArgumentTypeError(f"{text!r} is no latent size: give N, HxW or, of clips, FxHxW")
    return sides[0] if len(sides) == 1 else sides


def _wants_adapters(args: argparse.Namespace) -> bool:
    return args.to == "peft" or args.adapters_only


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go together, and what could not be read back, before anything is read."""
    if args.adapters_only and args.to != "flexidit":
        raise ValueError(f"--adapters-only is for --to flexidit, not {args.to}; --to peft writes adapters anyway")
    if _wants_adapters(args) and args.patch_size is not None:
        raise ValueError("adapters are written for all weak patch sizes; leave --patch-size out, or use --to merged")
    check_pipeline_arguments(args)
    path, known = args.output, _SUFFIXES.get(args.to)
    if known and (path.suffix not in known or path.is_dir()):
        raise ValueError(f"the {args.to} layout is one file that ends in {' or '.join(known)}, got {path}")
    if not known and (path.is_file() or path.suffix in (".safetensors", ".pt", ".pth", ".ckpt")):
        raise ValueError(f"the {args.to} layout is a folder, got {path}")


def _check_not_overwritten(output: Path, *sources: str | None) -> None:
    """Refuse to write over what is read: nothing could bring it back.

    Raises:
        ValueError: the output is one of the sources.
    """
    for source in sources:
        if source is not None and output.exists() and Path(source).exists() and output.samefile(source):
            raise ValueError(f"{output} is what is read, and would be lost; give another output")


def _recorded_base(found: Weights | Adapters, path: str) -> list[str]:
    """Where adapters say that their base is, if it is a local file."""
    from flexidit.checkpoint import near
    from flexidit.export import Adapters

    source = near(found.base.source, Path(path)) if isinstance(found, Adapters) else None
    return [] if source is None else [source]


def _convert_adapters(found: Weights | Adapters, args: argparse.Namespace) -> dict[str, Any]:
    """Write what the lora recipe added; the base is not needed for that, only checked if it is given."""
    from flexidit.checkpoint import base_of, read_any, save_adapters
    from flexidit.export import Adapters, adapters_of, save_peft

    added = found if isinstance(found, Adapters) else adapters_of(found.config, found.state, text=found.text)
    if args.base is not None:
        base_of(added, args.base, Path(args.input))
        added = replace(added, base=replace(added.base, source=args.base))
    read, added = facts_of(added.config, added.tensors), added.to(_dtype(args))
    written = save_peft(added, args.output) if args.to == "peft" else save_adapters(added, args.output)
    again = read_any(written)
    if not isinstance(again, Adapters) or (again.config, again.base) != (added.config, added.base):
        raise ValueError(f"{written} does not read back as it was written (its description differs); write it again")
    compare(added.tensors, again.tensors, written)
    warning = "" if added.base.source else "nothing says where the base is: give it with --base, or at every load"
    report = make_report(args, read, facts_of(added.config, added.tensors), warning, len(added.tensors))
    return {**report, "base": asdict(added.base)}


def _convert(found: Weights | Adapters, args: argparse.Namespace) -> dict[str, Any]:
    if _wants_adapters(args):
        return _convert_adapters(found, args)
    return convert_pipeline(_source(found, args), args) if args.to == PIPELINE else _convert_model(found, args)


def _source(found: Weights | Adapters, args: argparse.Namespace) -> FlexiTransformer:
    """The model that was read, adapters on their base."""
    from flexidit.checkpoint import build_from, complete

    weights = complete(found, args.base, Path(args.input))
    if args.input_size is not None and not weights.config.has_position_table:  # no weight depends on it
        weights = replace(weights, config=_meant_for(weights.config, args.input_size))
    return build_from(weights, Path(args.input))


def _convert_model(found: Weights | Adapters, args: argparse.Namespace) -> dict[str, Any]:
    from flexidit.checkpoint import save_checkpoint

    source = _source(found, args)
    model, layout = _chosen(source, args), _LAYOUTS[args.to]
    read = facts_of(source.config, dict(source.named_parameters()))
    if args.dtype is not None:
        model = model.to(_dtype(args))
    missing = _missing_fields(model, layout)
    warning = _warning(model.config, missing, layout)
    written = save_checkpoint(model, args.output, layout_format=layout, text=found.text)  # type: ignore[arg-type]
    num_tensors = _verify(model, written, missing, layout)
    return make_report(args, read, facts_of(model.config, dict(model.named_parameters())), warning, num_tensors)


def _meant_for(config: Any, size: int | tuple[int, ...]) -> Any:
    """The config of a model of clips of this size."""
    if isinstance(size, int) or len(size) != len(config.input_size):
        raise ValueError(f"this model takes clips: give --input-size as FxHxW, such as {times(config.input_size)}")
    return replace(config, input_size=size)


def _dtype(args: argparse.Namespace) -> Any:
    import torch

    return None if args.dtype is None else getattr(torch, args.dtype)


def _chosen(source: FlexiTransformer, args: argparse.Namespace) -> FlexiTransformer:
    """The model to write: as it is, or one of its patch sizes."""
    from flexidit.recipes import plain_copy

    if args.patch_size is not None:
        return plain_copy(source, args.patch_size)
    sizes = source.patch_sizes if args.to != "merged" else source.patch_sizes[1:]
    if args.to == "merged" and len(sizes) == 1:
        return plain_copy(source, sizes[0])
    if args.to == "merged" and not sizes:
        raise ValueError("this model has no weak patch size to merge; use --to diffusers")
    if args.to != "flexidit" and source.config.flex is not None:
        names = ", ".join(size.name for size in sizes)
        raise ValueError(f"the {args.to} layout holds one patch size; choose one of {names} with --patch-size")
    return source


def _missing_fields(model: FlexiTransformer, layout: str) -> dict[str, Any]:
    """Fields that the layout does not hold, with what a reader assumes for each; None: it must be told."""
    from flexidit.layouts import layout_of_config

    if layout == "flexidit":
        return {}
    told, assumed = _assumed_of_official(model) if layout == "official" else ([], _assumed_by_diffusers(model.config))
    config = layout_of_config(model.config).own_unit(model.config)
    names = [field.name for field in fields(config) if getattr(assumed, field.name) != getattr(config, field.name)]
    held = layout_of_config(config).held_otherwise(config, layout == "diffusers")
    return {**dict.fromkeys(told), **{name: getattr(assumed, name) for name in names if name not in held}}


def _assumed_by_diffusers(config: Any) -> Any:
    from flexidit.layouts import layout_of_config

    layout = layout_of_config(config)
    return layout.config_from_diffusers(layout.config_to_diffusers(config))


def _assumed_of_official(model: FlexiTransformer) -> tuple[list[str], Any]:
    """What readers must be told, as little as possible, and what they take for the rest."""
    from flexidit.layouts import layout_of_config

    layout = layout_of_config(model.config)
    read, state = layout.config_from_official, layout.to_official(model.state_dict())
    needed: tuple[list[str], ...] = ([], ["num_heads"], ["input_size"], ["num_heads", "input_size"])
    for names in needed[:-1]:
        try:
            return names, read(state, **{name: getattr(model.config, name) for name in names})
        except ValueError:
            continue
    return needed[-1], read(state, **{name: getattr(model.config, name) for name in needed[-1]})


def _warning(config: Any, missing: dict[str, Any], layout: str) -> str:
    """One sentence on what readers will do differently; empty if nothing."""
    from flexidit.layouts import layout_of_config

    told = [f"{name}={getattr(config, name)}" for name, assumed in missing.items() if assumed is None]
    differs = {name: f"{name}={assumed}" for name, assumed in missing.items() if assumed is not None}
    untold = layout_of_config(config).UNTOLD_BY_DIFFUSERS
    computed = [text for name, text in differs.items() if name not in untold]
    if computed and layout == "diffusers":
        return (
            f"diffusers' {family_of(config)} computes with {', '.join(computed)}, which these weights were not trained "
            "with, so its outputs differ a little, as they do for DiT's published weights in that layout"
        )
    sentences = [f"readers must be told {', '.join(told)}"] if told else []
    sentences += [f"readers told nothing take {', '.join(differs.values())}"] if differs else []
    return f"the {layout} layout does not hold everything: {'; '.join(sentences)}" if sentences else ""


def _verify(model: FlexiTransformer, written: Path, missing: dict[str, Any], layout: str) -> int:
    """Read back and compare every tensor; returns how many there were."""
    from flexidit.checkpoint import load_checkpoint
    from flexidit.layouts import layout_of_config

    config = layout_of_config(model.config).own_unit(model.config)
    again = load_checkpoint(written, **{name: getattr(config, name) for name in missing}).state_dict()
    derived = {"pos_embed"} if layout == "diffusers" else set()  # computed when read, hence equal to rounding only
    return compare(model.state_dict(), again, written, derived)
