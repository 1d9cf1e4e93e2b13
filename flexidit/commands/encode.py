"""``flexidit encode``: images to shards of latents."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flexidit.commands.sampling_setup import pick_device
from flexidit.images import find_images
from flexidit.latent_encoding import EncodeResult, EncodeSettings, encode_images
from flexidit.latents import LatentCodec

HELP = "turn images into shards of VAE latents, with labels, both flips and a fingerprint"
EXAMPLE = "flexidit encode data/imagenet/train --vae stabilityai/sd-vae-ft-ema --size 256 --out data/latents/train"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("images", type=Path, help="folder of images: one folder a class, or flat with labels.csv")
    parser.add_argument("--vae", required=True, help="folder or hub id of an AutoencoderKL or AutoencoderTiny")
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
    parser.add_argument("--no-flip", action="store_true", help="do not store mirror images: half the size and time")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Encode and report.

    Raises:
        FileNotFoundError, ValueError: in one sentence, on input that cannot be used.
    """
    device = str(pick_device(args.device))
    batch_size = args.batch_size if args.batch_size is not None else (4 if device == "cpu" else 32)
    workers = max(0, args.workers)
    settings = EncodeSettings(args.size, args.shard_size, batch_size, args.dtype, not args.no_flip, workers)
    images = find_images(args.images, args.labels, args.num_classes)
    codec = LatentCodec(args.vae, device=device, batch_size=batch_size)
    _ = codec.fingerprint  # a VAE that cannot be read is refused before the bar appears
    with _progress(enabled=not args.json) as on_progress:
        result = encode_images(images, codec, args.out, settings, on_progress)
    summary = _summary(result, args.out)
    print(json.dumps(summary) if args.json else _describe(result, args.out))
    return 0


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


def _summary(result: EncodeResult, out: Path) -> dict[str, object]:
    metadata = result.metadata
    return {
        "out": str(out),
        "num_samples": metadata.num_samples,
        "encoded": result.encoded,
        "kept": result.kept,
        "num_shards": len(metadata.shards),
        "latent_shape": metadata.latent_shape,
        "statistics": metadata.statistics(),
        "fingerprint": metadata.fingerprint,
        "skipped": [skip.as_dict() for skip in result.skips],
        "bytes": sum(entry.bytes for entry in metadata.entries()),
    }


def _describe(result: EncodeResult, out: Path) -> str:
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
    return "\n".join(lines + ([result.skips.summary("image")] if len(result.skips) else []))
