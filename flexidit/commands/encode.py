"""``flexidit encode``: images, with labels or captions, and captioned clips, to shards of latents."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flexidit.caption_shards import CaptionedLatents, encode_captioned
from flexidit.captioned_images import find_captioned_clips, find_captioned_images
from flexidit.clips import CLIP_SUFFIXES, ClipSettings
from flexidit.commands.sampling_setup import pick_device
from flexidit.files import write_atomically
from flexidit.images import IMAGE_SUFFIXES, find_images
from flexidit.latent_encoding import EncodeResult, EncodeSettings, encode_images
from flexidit.latents import Codec, LatentCodec, PixelCodec
from flexidit.sample_readers import ClipReader, ImageReader, SampleReader
from flexidit.skips import SkipReport
from flexidit.text import make_text_encoder

Encode = Callable[..., EncodeResult]

_SKIPPED = "skipped.jsonl"

_FRAMES, _FPS = 81, 16.0  # Wan's
_ALL_FRAMES = "all"

HELP = "turn images or clips into shards of VAE latents with a fingerprint: labelled, or with embedded captions"
EXAMPLE = (
    "flexidit encode data/imagenet/train --vae stabilityai/sd-vae-ft-ema --size 256 --out data/latents/train\n"
    "  flexidit encode data/coco/train2017 --captions data/coco/annotations/captions_train2017.json "
    "--text-encoder models/pixart --vae models/pixart/vae --out data/latents/coco\n"
    "  flexidit encode data/clips --captions --frames 81 --fps 16 --size 480x832 --text-encoder models/wan "
    "--vae models/wan/vae --out data/latents/clips"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="FOLDER",
        help="images (a folder a class, flat with labels.csv, or captioned), or captioned clips",
    )
    parser.add_argument(
        "--vae",
        required=True,
        help="folder or hub id of an AutoencoderKL or AutoencoderTiny, for clips also of an AutoencoderKLWan or "
        "AutoencoderKLCogVideoX; 'pixels' for none",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an interrupted run continues there")
    parser.add_argument(
        "--size", help="side of the centre crop in pixels, of clips also HxW (default 256; of clips 480x832)"
    )
    parser.add_argument("--labels", type=Path, help="CSV with class_index and file or wnid (default FOLDER/labels.csv)")
    parser.add_argument("--num-classes", type=int, help="classes of the model, to check the labels against")
    parser.add_argument(
        "--batch-size", type=int, help="samples encoded at once (default 4 on a CPU, 32 on a GPU; 1 clip)"
    )
    parser.add_argument(
        "--shard-size", type=int, help="samples a shard, what an interruption can lose (default 256 images, 32 clips)"
    )
    parser.add_argument("--workers", type=int, default=_default_workers(), help="processes that read files")
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
    _configure_clips(parser.add_argument_group("clips"))


def _configure_captions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--captions",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="COCO's .json, a .jsonl, or a folder of .txt or .json files; without PATH, what lies in FOLDER is used",
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


def _configure_clips(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--frames", type=int, metavar="N", help=f"of a clip, the middle ones of longer files (default {_FRAMES})"
    )
    group.add_argument(
        "--fps", help=f"frames a second, whatever the files have; 'all' takes them as stored (default {_FPS:g})"
    )
    group.add_argument(
        "--tiling", action="store_true", help="encode in overlapping tiles: less memory, slight differences at seams"
    )


def run(args: argparse.Namespace) -> int:
    """Encode and report.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used.
    """
    _check(args)
    reader = _reader(args)
    device = str(pick_device(args.device))
    settings = _settings(args, reader, device)
    encode = _with_labels(args) if args.captions is None else _with_captions(args, reader, device)
    codec = _codec(args, settings, device)
    reader.latent_size(codec)  # what does not fit the VAE, and a VAE that cannot be read,
    _ = codec.fingerprint  # are refused before the bar appears
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
    """Refuse options that contradict one another."""
    if args.captions is None and (args.text_encoder or args.tokenizer or args.max_tokens):
        raise ValueError("--text-encoder, --tokenizer and --max-tokens are for captions: add --captions")
    if args.captions is not None and not args.text_encoder:
        raise ValueError("--captions needs --text-encoder: the folder or hub id of a T5, or 'words' for demonstrations")
    if args.captions is not None and (args.labels or args.num_classes):
        raise ValueError("images are encoded with labels or with captions: leave out --captions, or the labels")


def _reader(args: argparse.Namespace) -> SampleReader:
    """For clips if that is what lies in the folder, or if ``--frames`` is given."""
    size = _parse_size(args.size)
    if args.frames is None and not _has_clips_only(args.source):
        if args.fps is not None:
            raise ValueError(f"--fps is for clips: add --frames to encode those of {args.source}, or leave it out")
        if isinstance(size, tuple):
            raise ValueError(f"images are cropped to squares: give one side to --size, got {args.size}")
        return ImageReader(size or 256)
    if args.captions is None:
        raise ValueError("clips are encoded with captions: add --captions and --text-encoder")
    square = (size, size) if isinstance(size, int) else (480, 832)
    frames = _FRAMES if args.frames is None else args.frames
    return ClipReader(ClipSettings(frames, size if isinstance(size, tuple) else square, _parse_fps(args.fps)))


def _has_clips_only(folder: Path) -> bool:
    """Whether there are clips below a folder and no images."""
    found = False
    for path in folder.rglob("*"):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            return False
        found = found or suffix in CLIP_SUFFIXES
    return found


def _parse_size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"--size {text!r} is no size: write 256, or 480x832 (height x width) for clips")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _parse_fps(text: str | None) -> float | None:
    if text == _ALL_FRAMES:
        return None
    try:
        return _FPS if text is None else float(text)
    except ValueError:
        raise ValueError(f"--fps {text!r} is no number: write 16, or {_ALL_FRAMES} for the frames as stored") from None


def _settings(args: argparse.Namespace, reader: SampleReader, device: str) -> EncodeSettings:
    is_clip = isinstance(reader, ClipReader)
    batch_size, shard_size = (1, 32) if is_clip else (_images_at_once(device), 256)
    return EncodeSettings(
        reader,
        shard_size=shard_size if args.shard_size is None else args.shard_size,
        batch_size=batch_size if args.batch_size is None else args.batch_size,
        dtype=args.dtype,
        flip=args.flip if args.flip is not None else args.captions is None,
        num_workers=max(0, args.workers),
    )


def _codec(args: argparse.Namespace, settings: EncodeSettings, device: str) -> Codec:
    """The VAE; it counts frames where this command counts clips."""
    if args.vae == "pixels":
        return PixelCodec()
    reader = settings.reader
    at_once = _images_at_once(device) if isinstance(reader, ClipReader) else settings.batch_size
    codec = LatentCodec(args.vae, device=device, batch_size=at_once, tiling=args.tiling)
    if isinstance(reader, ClipReader) and codec.is_video:
        codec.batch_size = settings.batch_size * reader.settings.num_frames
    return codec


def _images_at_once(device: str) -> int:
    return 4 if device == "cpu" else 32


def _with_labels(args: argparse.Namespace) -> Encode:
    return partial(encode_images, find_images(args.source, args.labels, args.num_classes))


def _with_captions(args: argparse.Namespace, reader: SampleReader, device: str) -> Encode:
    find = find_captioned_clips if isinstance(reader, ClipReader) else find_captioned_images
    source = find(args.source, None if args.captions == "auto" else args.captions)
    encoder = make_text_encoder(
        args.text_encoder,
        tokenizer=args.tokenizer,
        device=device,
        dtype=args.text_dtype,
        max_length=args.max_tokens,
        batch_size=8 if device == "cpu" else 64,
    )
    _ = encoder.fingerprint  # refused before the bar appears, as the VAE
    return partial(encode_captioned, source, encoder)


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
