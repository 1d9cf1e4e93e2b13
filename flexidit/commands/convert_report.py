"""What ``flexidit convert`` says of what it read and wrote, and how it makes sure that both are the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexidit.config import CaptionedConfig, family_of

if TYPE_CHECKING:
    from torch import Tensor


def compare(
    state: dict[str, Tensor], again: dict[str, Tensor], written: Path, derived: set[str] | frozenset[str] = frozenset()
) -> int:
    """Number of tensors, if all came back as they were.

    Raises:
        ValueError: one did not.
    """
    import torch

    differing = {name for name in state if name not in again or not torch.equal(state[name], again[name])}
    lost = sorted((differing | (set(again) - set(state))) - derived)
    if lost:
        raise ValueError(f"{written} does not read back as it was written ({lost[0]} differs); write it again")
    return len(state)


def facts_of(config: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Of a model and its parameters, or of adapters."""
    if isinstance(config, CaptionedConfig):
        condition = {"caption_length": config.caption_length, "caption_channels": config.caption_channels}
    else:
        condition = {"num_classes": config.num_classes}
    return {
        "family": family_of(config),
        "patch_sizes": [size.name for size in config.patch_sizes],
        "recipe": None if config.flex is None else config.flex.recipe,
        "depth": config.depth,
        "hidden_size": config.hidden_size,
        "input_size": list(config.input_size),
        "in_channels": config.in_channels,
        **condition,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    }


def make_report(
    args: argparse.Namespace, read: dict[str, Any], written: dict[str, Any], warning: str, num_tensors: int
) -> dict[str, Any]:
    """All that ``--json`` prints."""
    return {
        "input": str(args.input),
        "read": read,
        "output": str(args.output),
        "layout": args.to,
        "written": written,
        "bytes": _bytes(args.output),
        "tensors_compared": num_tensors,
        "warning": warning,
    }


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def describe(report: dict[str, Any]) -> str:
    """The report in words."""
    is_part = "base" in report
    lines = [
        f"read    {report['input']}: {_in_words(report['read'], is_part)}",
        f"written {report['output']}: {_in_words(report['written'], is_part)}",
        f"{report['layout']} layout, {report['bytes'] / 1e6:.1f} MB; read back, "
        f"all {report['tensors_compared']} tensors agree",
    ]
    if is_part:
        base = report["base"]
        lines.append(f"base    {base['source'] or 'not recorded where'}, weights {base['hash'][:12]}")
    if "call" in report:
        call = report["call"]
        lines.append(
            f"switch  from {call['transformer']} to {call['transformer_2']} at boundary_ratio "
            f"{call['boundary_ratio']:.4f}; call it with num_inference_steps={call['num_inference_steps']}"
        )
    return "\n".join(lines)


def _in_words(facts: dict[str, Any], is_part: bool = False) -> str:
    sides = times(facts["input_size"])
    kind = "plain" if facts["recipe"] is None else f"flexible ({facts['recipe']})"
    what = f"adapters of a {kind}" if is_part else kind
    condition = (
        f"{facts['num_classes']} classes"
        if "num_classes" in facts
        else f"captions of {facts['caption_length']} x {facts['caption_channels']}"
    )
    return (
        f"{what} {facts['family']}, {facts['depth']} blocks of width {facts['hidden_size']}, "
        f"patch {', '.join(facts['patch_sizes'])}, latent {facts['in_channels']}x{sides}, "
        f"{condition}, {facts['parameters'] / 1e6:.2f} M parameters, {facts['dtype']}"
    )


def times(sides: Sequence[int]) -> str:
    """``"8x16x16"``."""
    return "x".join(map(str, sides))
