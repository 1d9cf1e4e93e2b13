"""What the samples of ``flexidit sample`` are asked for: classes or prompts, each several times.

Shape legend: N samples, K of each class or prompt, L caption tokens, E width of the text encoder.
"""

from __future__ import annotations

import argparse
import gc
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexidit.commands.sampling_setup import LoadedModel, parse_numbers
from flexidit.commands.text_setup import add_text_arguments, open_text_encoder, warn_of_cut
from flexidit.commands.vbench_layout import CLIPS_PER_PROMPT
from flexidit.conditions import Captions
from flexidit.config import CaptionedConfig

_NUM_EACH = 4
_LABEL_WIDTH, _NOTE_WIDTH = 40, 48  # characters beside a row of pictures, in the sizes of its two lines


@dataclass(frozen=True)
class Asked:
    """Classes or prompts, in the words of the command line; nothing is computed yet."""

    num_each: int
    """K."""
    classes: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Each class or prompt, for people."""
        return list(self.prompts) or [f"class {label}" for label in self.classes]

    @property
    def is_text(self) -> bool:
        """Whether they are prompts."""
        return bool(self.prompts)

    @property
    def kind(self) -> str:
        """``"class"`` or ``"prompt"``."""
        return "prompt" if self.is_text else "class"

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.names) * self.num_each

    def indices(self) -> Tensor:
        """The class, or the place of the prompt, of each sample: (N,)."""
        each = torch.arange(len(self.prompts)) if self.is_text else torch.tensor(self.classes)
        return each.repeat_interleave(self.num_each)

    def rows(self) -> Tensor:
        """The place in :attr:`names` of each sample: (N,)."""
        return torch.arange(len(self.names)).repeat_interleave(self.num_each)

    def stems(self) -> list[str]:
        """What the name of each sample's file begins with."""
        width = len(str(len(self.prompts) - 1)) if self.is_text else 1
        digits = len(str(self.num_each - 1))
        return [
            f"{self.kind}-{index:0{width}d}_{place % self.num_each:0{digits}d}"
            for place, index in enumerate(self.indices().tolist())
        ]

    def labels(self) -> list[tuple[str, str]]:
        """Each name in two lines of a picture, the second often empty."""
        return [_two_lines(name) for name in self.names]


@dataclass(frozen=True)
class Told:
    """The same as the model is told it."""

    y: Tensor | Captions
    """One label or caption for each of what was asked for; :attr:`rows` are those of the samples."""
    rows: Tensor
    """(N,) places in ``y``."""
    negative: Captions | None
    """One caption to guide away from; None: the model's null condition."""
    record: dict[str, Any]
    """What a report must say: prompts, who embedded them, and how FLOPs count them."""


def add_condition_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is asked for."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--classes", metavar="LIST", help="class indices: 207,360 or 0-9")
    which.add_argument("--prompts", metavar="TEXTS", help="separated by semicolons: 'a bold seven;a thin two'")
    which.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument(
        "--num-per-class",
        "--num-per-prompt",
        dest="num_each",
        type=int,
        metavar="N",
        help="samples of each class or prompt (default: 4; in VBench's layout 5)",
    )
    add_text_arguments(parser.add_argument_group("models of text"))


def read_asked(args: argparse.Namespace, loaded: LoadedModel) -> Asked:
    """Read the arguments.

    Raises:
        FileNotFoundError, ValueError: classes that the model does not have, prompts for a model of classes or classes
            for a model of text, no prompt at all.
    """
    num_each = args.num_each
    if num_each is None:
        num_each = CLIPS_PER_PROMPT if args.layout == "vbench" else _NUM_EACH
    if num_each < 1:
        raise ValueError(f"--num-per-class or --num-per-prompt {num_each} must be at least 1")
    config = loaded.model.config
    if isinstance(config, CaptionedConfig):
        if args.classes is not None:
            raise ValueError("this model is told captions, not classes; give --prompts or --prompt-file")
        prompts = _read_prompts(args)
        return Asked(num_each, prompts=tuple(dict.fromkeys(prompts) if args.layout == "vbench" else prompts))
    for option in ("prompts", "prompt_file", "text_encoder", "tokenizer", "negative"):
        if getattr(args, option) is not None:
            raise ValueError(f"this model is told classes, not captions; leave --{option.replace('_', '-')} out")
    return Asked(num_each, classes=tuple(_read_classes(args.classes, config.num_classes)))


def tell(args: argparse.Namespace, loaded: LoadedModel, asked: Asked) -> Told:
    """Embed prompts; the text encoder is gone afterwards, and leaves its memory to sampling.

    Raises:
        FileNotFoundError, ValueError: a text encoder that cannot be had, or is not the model's.
    """
    if not asked.is_text:
        return Told(torch.tensor(asked.classes), asked.rows(), None, {})
    negative = args.negative
    if negative is None and not loaded.model.config.has_null_caption:
        negative = ""  # these weights hold no null caption, and diffusers' pipelines take the empty prompt then
    encoder = open_text_encoder(args.text_encoder, args.tokenizer, loaded)
    texts = [*asked.prompts, *([negative] if negative else [])]
    warn_of_cut(texts, encoder)
    y = encoder.encode(asked.prompts)
    away = None if negative is None else encoder.encode([negative])
    record = {
        "prompts": list(asked.prompts),
        "negative": negative,
        "text_encoder": encoder.fingerprint,
        "captions_counted": "every_step",
    }
    del encoder
    gc.collect()
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
    return Told(y, asked.rows(), away, record)


def _read_prompts(args: argparse.Namespace) -> list[str]:
    from flexidit.metrics.prompts import read_prompts

    if args.prompt_file is not None:
        return read_prompts(args.prompt_file)
    prompts = [text.strip() for text in args.prompts.split(";") if text.strip()]
    if not prompts:
        raise ValueError("--prompts holds no prompt; write them as 'a bold seven;a thin two'")
    return prompts


def _read_classes(text: str, num_classes: int) -> list[int]:
    classes = parse_numbers(text, int, "--classes")
    for label in classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} is not one of the model's {num_classes} classes, 0 to {num_classes - 1}")
    return classes


def _two_lines(name: str) -> tuple[str, str]:
    first, *rest = textwrap.wrap(name, _LABEL_WIDTH)
    return first, textwrap.shorten(" ".join(rest), _NOTE_WIDTH, placeholder=" ...") if rest else ""
