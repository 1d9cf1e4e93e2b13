"""``flexidit encode``: images, with labels or captions, to shards of latents."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flexidit.caption_shards import CaptionedLatents, encode_captioned
from flexidit.captioned_images import find_captioned_images
from flexidit.commands.sampling_setup import pick_device
from flexidit.files import write_atomically
from flexidit.images import find_images
from flexidit.latent_encoding import EncodeResult, EncodeSettings, encode_images
from flexidit.latents import LatentCodec, PixelCodec
from flexidit.skips import SkipReport
from flexidit.text import make_text_encoder

Encode = Callable[..., EncodeResult]

_SKIPPED = "skipped.jsonl"

HELP = "turn images into shards of VAE latents with a fingerprint: labelled, in both flips, or with embedded captions"
EXAMPLE = (
    "flexidit encode data/imagenet/train --vae stabilityai/sd-vae-ft-ema --size 256 --out data/latents/train\n"
    "  flexidit encode data/coco/train2017 --captions data/coco/annotations/captions_train2017.json "
    "--text-encoder models/pixart --vae models/pixart/vae --out data/latents/coco"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "images", type=Path, help="folder of images: a folder a class, flat with labels.csv, or captioned"
    )
    parser.add_argument(
        "--vae", required=True, help="folder or hub id of an AutoencoderKL or AutoencoderTiny; 'pixels' for none"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an interrupted run continues there")
    parser.add_argument("--size", type=int, default=256, help="side of the centre crop in pixels (default 256)")
    parser.add_argument("--labels", type=Path, help="CSV with class_index and file or wnid (default IMAGES/labels.csv)")
    parser.add_argument("--num-classes", type=int, help="classes of the model, to check the labels against")
    parser.add_argument("--batch-size", type=int, help="images encoded at once (default 4 on a CPU, 32 on a GPU)")
    parser.add_argument(
        "--shard-size", type=int, default=256, help="images a shard, what an interruption can lose (default 256)"
    )
    parser.add_argument("--workers", type=int, default=_default_workers(), help="processes that read images")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="on disk (default float16)"
    )
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="store mirror images too: twice the size and time (default: yes for labels; no for captions, which may "
        "say left or right)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    _configure_captions(parser.add_argument_group("captions"))


def _configure_captions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--captions",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="COCO's .json, a .jsonl, or a folder of .txt or .json files; without PATH, what lies in IMAGES is used",
    )
    group.add_argument(
        "--text-encoder", metavar="NAME", help="folder or hub id of a T5 or of its pipeline; 'words' for demonstrations"
    )
    group.add_argument("--tokenizer", metavar="NAME", help="folder or hub id, where it is not beside the text encoder")
    group.add_argument("--max-tokens", type=int, metavar="N", help="of a caption (default 120; of 'words' 16)")
    group.add_argument(
        "--text-dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of T5 and its embeddings (default bfloat16)",
    )


def run(args: argparse.Namespace) -> int:
    """Encode and report.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used.
    """
    _check(args)
    device = str(pick_device(args.device))
    batch_size = args.batch_size if args.batch_size is not None else (4 if device == "cpu" else 32)
    flip = args.flip if args.flip is not None else args.captions is None
    settings = EncodeSettings(args.size, args.shard_size, batch_size, args.dtype, flip, max(0, args.workers))
    encode = _with_labels(args) if args.captions is None else _with_captions(args, device)
    codec = PixelCodec() if args.vae == "pixels" else LatentCodec(args.vae, device=device, batch_size=batch_size)
    _ = codec.fingerprint  # a VAE that cannot be read is refused before the bar appears
    with _progress(enabled=not args.json) as on_progress:
        result = encode(codec, args.out, settings, on_progress)
    _write_skips(result, args.out)
    written = None if args.captions is None else CaptionedLatents(args.out)
    print(json.dumps(_summary(result, args.out, written)) if args.json else _describe(result, args.out, written))
    return 0


def _write_skips(result: EncodeResult, out: Path) -> None:
    """Everything that was left out or cut, a line each: messages name the first few only."""
    lines = [json.dumps(skip.as_dict()) + "\n" for skip in (*result.skips, *result.truncated)]
    write_atomically(out / _SKIPPED, "".join(lines).encode())


def _check(args: argparse.Namespace) -> None:
    """Options that contradict one another."""
    if args.captions is None and (args.text_encoder or args.tokenizer or args.max_tokens):
        raise ValueError("--text-encoder, --tokenizer and --max-tokens are for captioned images: add --captions")
    if args.captions is not None and not args.text_encoder:
        raise ValueError("--captions needs --text-encoder: the folder or hub id of a T5, or 'words' for demonstrations")
    if args.captions is not None and (args.labels or args.num_classes):
        raise ValueError("images are encoded with labels or with captions: leave out --captions, or the labels")


def _with_labels(args: argparse.Namespace) -> Encode:
    return partial(encode_images, find_images(args.images, args.labels, args.num_classes))


def _with_captions(args: argparse.Namespace, device: str) -> Encode:
    images = find_captioned_images(args.images, None if args.captions == "auto" else args.captions)
    encoder = make_text_encoder(
        args.text_encoder,
        tokenizer=args.tokenizer,
        device=device,
        dtype=args.text_dtype,
        max_length=args.max_tokens,
        batch_size=8 if device == "cpu" else 64,
    )
    _ = encoder.fingerprint  # refused before the bar appears, as the VAE
    return partial(encode_captioned, images, encoder)


def _default_workers() -> int:
    return min(8, max(0, (os.cpu_count() or 1) - 1))


@contextmanager
def _progress(enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as progress:
        task = progress.add_task("encoding", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _summary(result: EncodeResult, out: Path, written: CaptionedLatents | None) -> dict[str, object]:
    metadata = result.metadata
    summary: dict[str, object] = {
        "out": str(out),
        "num_samples": metadata.num_samples,
        "encoded": result.encoded,
        "kept": result.kept,
        "num_shards": len(metadata.shards),
        "latent_shape": metadata.latent_shape,
        "statistics": metadata.statistics(),
        "fingerprint": metadata.fingerprint,
        "skipped": [skip.as_dict() for skip in result.skips],
        "truncated": [skip.as_dict() for skip in result.truncated],
        "bytes": sum(entry.bytes for entry in metadata.entries()),
    }
    if written is not None:
        summary |= {"num_captions": written.total_captions, "longest_caption": written.longest}
    return summary


def _describe(result: EncodeResult, out: Path, written: CaptionedLatents | None) -> str:
    metadata = result.metadata
    statistics = metadata.statistics()
    shape = " x ".join(map(str, metadata.latent_shape))
    size = sum(entry.bytes for entry in metadata.entries()) / 1e6
    lines = [
        f"{metadata.num_samples} latents of {shape} in {len(metadata.shards)} shards, {size:.1f} MB: {out}",
        f"encoded now {result.encoded}, kept from before {result.kept}",
        "channel mean " + " ".join(f"{value:+.2f}" for value in statistics["mean"]),
        "channel std  " + " ".join(f"{value:5.2f}" for value in statistics["std"]),
    ]
    if written is not None:
        length, width = written.caption_shape
        lines.insert(
            1, f"{written.total_captions} captions of up to {written.longest} tokens (of {length}), {width} wide"
        )
    if len(result.skips):
        lines.append(result.skips.summary("item" if "text_encoder" in metadata.fingerprint else "image"))
        lines.append(f"all of them: {out / _SKIPPED}")
    if len(result.truncated):
        lines.append(_describe_truncated(result.truncated))
    return "\n".join(lines)


def _describe_truncated(truncated: SkipReport, limit: int = 5) -> str:
    named = ", ".join(skip.name for skip in list(truncated)[:limit])
    more = f", and {len(truncated) - limit} more" if len(truncated) > limit else ""
    plural = "" if len(truncated) == 1 else "s"
    return f"{len(truncated)} caption{plural} {truncated.skips[0].reason}: {named}{more}"
