"""What the samples of ``flexidit curve`` are asked for, and who judges whether they are that."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexidit.commands.evaluator import Evaluator
from flexidit.commands.sampling_setup import LoadedModel, progress_bar
from flexidit.commands.text_setup import add_text_arguments, open_text_encoder
from flexidit.config import CaptionedConfig
from flexidit.metrics.prompts import Prompts, read_coco_prompts, read_prompts

if TYPE_CHECKING:
    from flexidit.metrics.judges import Judge

_DIGITS = "digits"
_OPTIONS = ("prompt_file", "captions", "text_encoder", "tokenizer", "negative", "clip")


@dataclass(frozen=True)
class Asked:
    """Prompts, for a model of captions."""

    prompts: Prompts
    encoder: dict[str, Any]
    """Fingerprint of the text encoder."""
    num_truncated: int
    """Prompts that are too long for the model, and lose their ends."""

    @property
    def note(self) -> str:
        """What a reader of the numbers must know; empty if nothing."""
        if not self.num_truncated:
            return ""
        return (
            f"{self.num_truncated} of {len(self.prompts)} prompts are longer than the model reads and lost their ends."
        )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what models of captions are asked for."""
    group = parser.add_argument_group("models of captions")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--prompt-file", metavar="FILE", help="one a line, taken in turn; or 'digits' for digits' captions"
    )
    which.add_argument(
        "--captions", type=Path, metavar="JSON", help="COCO's annotations: a caption of every image first"
    )
    add_text_arguments(group)
    group.add_argument("--clip", metavar="NAME", help="folder or hub id of a CLIP, to measure the CLIP score")


def read_texts(args: argparse.Namespace, model: Any) -> list[str] | None:
    """The prompts, as many as there are samples at most; None for a model of classes.

    Raises:
        FileNotFoundError, ValueError: no or unusable prompts, or prompts for a model of classes.
    """
    if not isinstance(model.config, CaptionedConfig):
        given = [name for name in _OPTIONS if getattr(args, name) is not None]
        if given:
            raise ValueError(f"this model is told classes, not captions; leave --{given[0].replace('_', '-')} out")
        return None
    if args.prompt_file == _DIGITS:
        return _digit_prompts(model, args.num_samples)
    if args.prompt_file is not None:
        return read_prompts(args.prompt_file)[: args.num_samples]
    if args.captions is not None:
        return read_coco_prompts(args.captions)[: args.num_samples]
    raise ValueError(
        "this model is told captions; give --prompt-file FILE, --prompt-file digits, or --captions COCO.json"
    )


def _digit_prompts(model: Any, count: int) -> list[str]:
    if len(model.input_size) == 3:
        from flexidit.metrics.moving_digits import moving_prompts

        return moving_prompts(count)
    from flexidit.metrics.digit_attributes import prompts

    return prompts(count)


def embed(args: argparse.Namespace, loaded: LoadedModel, texts: Sequence[str]) -> Asked:
    """The prompts as the model reads them; the text encoder is gone afterwards, and leaves its memory to sampling.

    Raises:
        FileNotFoundError, ValueError: a text encoder that cannot be had, or is not the model's.
    """
    encoder = open_text_encoder(args.text_encoder, args.tokenizer, loaded)
    negative = args.negative
    if negative is None and not loaded.model.config.has_null_caption:
        negative = ""  # these weights hold no null caption, and diffusers' pipelines take the empty prompt then
    with progress_bar("reading prompts", len(texts), enabled=not args.json) as advance:
        prompts = Prompts.encode(texts, encoder, _name(args), negative, on_chunk=advance)
    asked = Asked(prompts, encoder.fingerprint, sum(encoder.truncated(texts)))
    del encoder
    gc.collect()
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
    return asked


def _name(args: argparse.Namespace) -> str:
    if args.prompt_file == _DIGITS:
        return "captions of scikit-learn's digits"
    return Path(args.prompt_file or args.captions).name


def judges_of(
    args: argparse.Namespace, evaluator: Evaluator, texts: Sequence[str] | None, is_video: bool = False
) -> list[Judge]:
    """Digits are measured against their captions; a CLIP, where it is given, compares anything; clips are seen to move.

    Args:
        args: of the command.
        evaluator: knows the digits, where samples are digits.
        texts: the prompts; None: samples are asked for by class.
        is_video: whether samples are clips.

    Raises:
        FileNotFoundError, ValueError: prompts that are no digit captions, or a CLIP that cannot be had.
    """
    from flexidit.metrics.judges import ClipMotion, EachFrame

    judges: list[Judge] = [ClipMotion()] if is_video else []
    if texts is None:
        return judges
    agreement = _agreement(evaluator, texts)
    if agreement is not None:
        judges.insert(0, agreement)
    if args.clip is not None:
        from flexidit.metrics.clip import CLIPScore

        score = CLIPScore(args.clip)
        judges.append(EachFrame(score) if is_video else score)
    return judges


def _agreement(evaluator: Evaluator, texts: Sequence[str]) -> Judge | None:
    """Who knows the digits; refuses before hours of sampling what agreement could not be measured on, not after."""
    from flexidit.digit_captions import parse_caption
    from flexidit.metrics.judges import DigitAgreement
    from flexidit.moving_captions import parse_moving_caption

    moves = evaluator.agreement is not None
    if not moves and evaluator.classifier is None:  # no other classifier is known
        return None
    for text in set(texts):
        (parse_moving_caption if moves else parse_caption)(text)
    return evaluator.agreement if evaluator.classifier is None else DigitAgreement(evaluator.classifier)
