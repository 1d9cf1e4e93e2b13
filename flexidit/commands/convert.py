"""``flexidit convert``: weights from any layout to any other, and one patch size of a flexible model as a plain one."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexidit.config import DiTConfig
    from flexidit.models.dit import DiT

HELP = "official, diffusers, flexidit and training checkpoints to one another; one patch size as a plain model"
EXAMPLE = "flexidit convert student.safetensors DiT-XL-4 --to diffusers --patch-size 4"

_SUFFIXES = {"flexidit": (".safetensors",), "official": (".pt", ".pth")}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", help="flexidit, official or diffusers weights, a training .ckpt, or a hub id")
    parser.add_argument("output", type=Path, help=".safetensors (flexidit), .pt (official) or folder (diffusers)")
    parser.add_argument("--to", required=True, choices=("flexidit", "official", "diffusers"), help="layout to write")
    parser.add_argument(
        "--patch-size", metavar="SIZE", help="write a plain model of this size: adapters merged, weights projected"
    )
    parser.add_argument("--no-ema", action="store_true", help="not the averaged weights where a checkpoint has both")
    parser.add_argument("--num-heads", type=int, metavar="N", help="of official weights of no published width")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Read, write, read back and compare.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used or layouts that cannot hold it.
    """
    from flexidit.checkpoint import save_checkpoint
    from flexidit.commands.sampling_setup import read_checkpoint

    _check_output(args.output, args.to)
    source = read_checkpoint(args.input, prefer_ema=not args.no_ema, num_heads=args.num_heads)
    model = _chosen(source, args)
    missing = _missing_fields(model, args.to)
    _check_positions(model, args.to)
    warning = _warning(model.config, missing, args.to)
    if warning:
        print(f"flexidit convert: {warning}", file=sys.stderr)
    written = save_checkpoint(model, args.output, layout_format=args.to)
    num_tensors = _verify(model, written, {name: getattr(model.config, name) for name in missing}, args.to)
    report = {
        "input": str(args.input),
        "read": _facts(source),
        "output": str(written),
        "layout": args.to,
        "written": _facts(model),
        "bytes": _bytes(written),
        "tensors_compared": num_tensors,
        "warning": warning,
    }
    print(json.dumps(report) if args.json else _describe(report))
    return 0


def _check_output(path: Path, layout: str) -> None:
    """Refuse what could not be read back, before anything is read."""
    known = _SUFFIXES.get(layout)
    if known and (path.suffix not in known or path.is_dir()):
        raise ValueError(f"the {layout} layout is one file that ends in {' or '.join(known)}, got {path}")
    if not known and (path.is_file() or path.suffix in (".safetensors", ".pt", ".pth", ".ckpt")):
        raise ValueError(f"the {layout} layout is a folder, got {path}")


def _chosen(source: DiT, args: argparse.Namespace) -> DiT:
    """The model to write: as it is, or one of its patch sizes."""
    from flexidit.recipes import plain_copy

    if args.patch_size is not None:
        return plain_copy(source, args.patch_size)
    if args.to != "flexidit" and source.config.flex is not None:
        sizes = ", ".join(size.name for size in source.patch_sizes)
        raise ValueError(f"the {args.to} layout holds one patch size; choose one of {sizes} with --patch-size")
    return source


def _missing_fields(model: DiT, layout: str) -> dict[str, Any]:
    """Fields that the layout does not hold, with what a reader assumes for each; None: it must be told."""
    if layout == "flexidit":
        return {}
    assumed = _assumed_by_diffusers(model.config) if layout == "diffusers" else _assumed_of_official(model)
    config = model.config
    names = [field.name for field in fields(config) if getattr(assumed, field.name) != getattr(config, field.name)]
    if config.class_dropout_prob and "class_dropout_prob" in names:
        names.remove("class_dropout_prob")  # the rate matters in training only; that there is a null label is held
    missing: dict[str, Any] = {name: getattr(assumed, name) for name in names}
    if layout == "official" and not _is_published_width(model):
        missing["num_heads"] = None
    return missing


def _assumed_by_diffusers(config: DiTConfig) -> DiTConfig:
    from flexidit.layouts.dit import config_from_diffusers, config_to_diffusers

    return config_from_diffusers(config_to_diffusers(config))


def _assumed_of_official(model: DiT) -> DiTConfig:
    from flexidit.layouts.dit import config_from_official

    heads = None if _is_published_width(model) else model.config.num_heads
    return config_from_official(model.state_dict(), num_heads=heads)


def _is_published_width(model: DiT) -> bool:
    from flexidit.layouts.dit import config_from_official

    try:
        config_from_official(model.state_dict())
    except ValueError:
        return False
    return True


def _check_positions(model: DiT, layout: str) -> None:
    """diffusers computes positions from the indices of patches; any others would be lost without a word."""
    import torch

    from flexidit.models.dit import DiT

    if layout != "diffusers":
        return
    size, sides = model.base_patch_size, model.input_size
    if sides[0] % size.h or sides[1] % size.w:
        raise ValueError(
            f"diffusers' DiT takes whole patches, not {size.name} on {sides[0]}x{sides[1]}; use --to official"
        )
    by_index = DiT(replace(model.config, depth=0)).pos_embed
    if not torch.allclose(by_index, model.pos_embed.float(), atol=1e-3):
        raise ValueError(
            f"diffusers' DiT puts patches at their index and this model has those of size "
            f"{size.name} elsewhere (their centres, positions='coords'); use --to official, which "
            "stores positions, or flexify with positions='grid'"
        )


def _warning(config: DiTConfig, missing: dict[str, Any], layout: str) -> str:
    """One sentence on what readers will do differently; empty if nothing."""
    told = [f"{name}={getattr(config, name)}" for name, assumed in missing.items() if assumed is None]
    differs = [f"{name}={assumed}" for name, assumed in missing.items() if assumed is not None]
    if differs and layout == "diffusers":
        return (
            f"diffusers' DiT computes with {', '.join(differs)}, which these weights were not trained with, so its "
            "outputs differ a little, as they do for DiT's published weights in that layout"
        )
    sentences = [f"readers must be told {', '.join(told)}"] if told else []
    sentences += [f"readers told nothing, such as DiT's own code, take {', '.join(differs)}"] if differs else []
    return f"the official layout does not hold everything: {'; '.join(sentences)}" if sentences else ""


def _verify(model: DiT, written: Path, overrides: dict[str, Any], layout: str) -> int:
    """Read back and compare every tensor; returns how many there were."""
    import torch

    from flexidit.checkpoint import load_checkpoint

    again = load_checkpoint(written, **(overrides if layout == "official" else {})).state_dict()
    state = model.state_dict()
    derived = {"pos_embed"} if layout == "diffusers" else set()  # computed when read, hence equal to rounding only
    differing = [name for name in state if name not in again or not torch.equal(state[name], again[name])]
    lost = sorted((set(differing) | set(again) - set(state)) - derived)
    if lost:
        raise ValueError(f"{written} does not read back as it was written ({lost[0]} differs); write it again")
    return len(state)


def _facts(model: DiT) -> dict[str, Any]:
    config = model.config
    return {
        "patch_sizes": [size.name for size in model.patch_sizes],
        "recipe": None if config.flex is None else config.flex.recipe,
        "depth": config.depth,
        "hidden_size": config.hidden_size,
        "input_size": list(config.input_size),
        "in_channels": config.in_channels,
        "num_classes": config.num_classes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _describe(report: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"read    {report['input']}: {_in_words(report['read'])}",
            f"written {report['output']}: {_in_words(report['written'])}",
            f"{report['layout']} layout, {report['bytes'] / 1e6:.1f} MB; read back, "
            f"all {report['tensors_compared']} tensors agree",
        ]
    )


def _in_words(facts: dict[str, Any]) -> str:
    height, width = facts["input_size"]
    kind = "plain" if facts["recipe"] is None else f"flexible ({facts['recipe']})"
    return (
        f"{kind} DiT, {facts['depth']} blocks of width {facts['hidden_size']}, "
        f"patch {', '.join(facts['patch_sizes'])}, latent {facts['in_channels']}x{height}x{width}, "
        f"{facts['num_classes']} classes, {facts['parameters'] / 1e6:.2f} M parameters, {facts['dtype']}"
    )
