"""What ``flexidit sample`` writes: a file for each sample, and one picture of all of them.

Images become PNGs and a grid; clips become mp4 and gif files, and a contact sheet.

Shape legend: n samples of one batch, C channels, F frames, H W height and width, Z latent channels.
"""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexidit.clip_files import CLIP_FORMATS, encode_clip
from flexidit.clip_pictures import ClipRow, contact_sheet
from flexidit.commands import vbench_layout
from flexidit.commands.sample_conditions import Asked
from flexidit.commands.sample_plans import Plan
from flexidit.commands.sampling_setup import Codec
from flexidit.files import write_atomically
from flexidit.pictures import GridRow, draw_grid, to_image

_FPS = 8.0
_MOST_ROWS = 32  # of a contact sheet
_SAME_NOISE = "the same noise at each budget"


class Cost(NamedTuple):
    """Of what ran under one schedule."""

    relative_flops: float
    time: str
    """In words, of one sample."""

    @property
    def headline(self) -> str:
        """Both, as a title."""
        return f"{self.relative_flops:.1%} of the FLOPs, {self.time}"


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how clips are written."""
    group = parser.add_argument_group("models of clips")
    group.add_argument(
        "--clip-format", metavar="LIST", help=f"of {', '.join(CLIP_FORMATS)} (default: both; in VBench's layout mp4)"
    )
    group.add_argument("--fps", type=float, metavar="X", help=f"frames per second of the files (default: {_FPS:g})")
    group.add_argument(
        "--layout",
        choices=("numbered", "vbench"),
        default="numbered",
        help="names of files: by number, or as VBench finds them, with a script to run it (default: %(default)s)",
    )


class SampleFiles(ABC):
    """Takes samples batch by batch and writes them; :meth:`finish` draws the overview.

    Args:
        out: Folder.
        asked: What the samples were asked for.
        saves_latents: Whether latents are saved too.
    """

    sample: str
    """What a sample is called."""
    overview: str
    """Name of the picture of all of them."""

    def __init__(self, out: Path, asked: Asked, saves_latents: bool) -> None:
        self.out, self.asked, self.saves_latents = out, asked, saves_latents
        self.stems = asked.stems()
        self.extra: list[str] = []
        """Files beside those of single samples."""
        self.hints: list[str] = []
        """What to do with the files."""
        self._latents: list[Tensor] = []

    @property
    def record(self) -> dict[str, Any]:
        """What ``samples.json`` says of the files."""
        return {}

    def begin(self, plan: Plan) -> list[str]:
        """Names of the files of a plan, none yet."""
        self._latents = []
        return []

    def write(self, plan: Plan, places: Sequence[int], latents: Tensor, pixels: Tensor | None) -> list[str]:
        """Write a batch: n places among the samples, (n, Z, ...) latents, (n, C, ...) pixels; names of the files."""
        if self.saves_latents:
            self._latents.append(latents)
        if pixels is None:
            return []
        return [name for place, one in zip(places, pixels, strict=True) for name in self._write_one(plan, place, one)]

    def end(self, plan: Plan) -> list[str]:
        """Write what belongs to a whole plan; names of the files."""
        if not self.saves_latents:
            return []
        from safetensors.torch import save

        which = "prompts" if self.asked.is_text else "classes"
        tensors = {"latents": torch.cat(self._latents).contiguous(), which: self.asked.indices()}
        name = f"{plan.prefix}latents.safetensors"
        write_atomically(self.out / name, save(tensors))
        return [name]

    def finish(self, costs: Sequence[Cost]) -> None:
        """Draw the overview of all plans, one cost each, if anything was decoded."""
        picture = self._draw(costs)
        if picture is not None:
            write_atomically(self.out / self.overview, _png(picture))
            self.extra.insert(0, self.overview)

    @abstractmethod
    def _write_one(self, plan: Plan, place: int, pixels: Tensor) -> list[str]:
        """Write one sample; names of its files."""

    @abstractmethod
    def _draw(self, costs: Sequence[Cost]) -> Any:
        """The overview; None where there are no pixels."""


class ImageFiles(SampleFiles):
    """PNGs, and a grid.

    A row for each class or prompt; of several budgets a row for each, or, as prompts are long, a column.
    """

    sample, overview = "image", "grid.png"

    def __init__(self, out: Path, asked: Asked, saves_latents: bool) -> None:
        super().__init__(out, asked, saves_latents)
        self._pictures: dict[Plan, list[Tensor]] = defaultdict(list)

    def _write_one(self, plan: Plan, place: int, pixels: Tensor) -> list[str]:
        name = f"{plan.prefix}{self.stems[place]}.png"
        write_atomically(self.out / name, _png(to_image(pixels)))
        self._pictures[plan].append(pixels)
        return [name]

    def _draw(self, costs: Sequence[Cost]) -> Any:
        pictures, asked = [torch.stack(images) for images in self._pictures.values()], self.asked
        if not pictures:
            return None
        if len(costs) == 1:
            images = pictures[0].chunk(len(asked.names))
            rows = [GridRow(row, *label) for row, label in zip(images, asked.labels(), strict=True)]
            return draw_grid(rows, costs[0].headline)
        if asked.is_text:
            names = [label for label in asked.labels() for _ in range(asked.num_each)]
            beside = torch.stack(pictures, dim=1)  # (N, budgets, C, H, W)
            rows = [GridRow(row, *label) for row, label in zip(beside, names, strict=True)]
            return draw_grid(rows, _SAME_NOISE, [f"{cost.relative_flops:.0%}" for cost in costs])
        notes = [(f"{cost.relative_flops:.1%} FLOPs", cost.time) for cost in costs]
        rows = [GridRow(images, *note) for images, note in zip(pictures, notes, strict=True)]
        return draw_grid(rows, _SAME_NOISE, [f"class {label}" for label in asked.indices().tolist()])


class ClipFiles(SampleFiles):
    """Clips, and a contact sheet: rows are samples, each at one budget below the other, columns frames.

    Args:
        out: Folder.
        asked: What the samples were asked for.
        saves_latents: Whether latents are saved too.
        formats: Of :data:`~flexidit.clip_files.CLIP_FORMATS`, a file each.
        fps: Frames per second.
    """

    sample, overview = "clip", "contact_sheet.png"

    def __init__(self, out: Path, asked: Asked, saves_latents: bool, formats: Sequence[str], fps: float) -> None:
        super().__init__(out, asked, saves_latents)
        self.formats, self.fps = formats, fps
        self._shown = self._chosen()
        self._clips: dict[int, list[Tensor]] = defaultdict(list)

    @property
    def record(self) -> dict[str, Any]:
        return {"fps": self.fps}

    def _write_one(self, plan: Plan, place: int, pixels: Tensor) -> list[str]:
        names = [self._name(plan, place, suffix) for suffix in self.formats]
        for name, suffix in zip(names, self.formats, strict=True):
            write_atomically(self.out / name, encode_clip(pixels, suffix, self.fps))
        if place in self._shown:
            self._clips[place].append(pixels)
        return names

    def _name(self, plan: Plan, place: int, suffix: str) -> str:
        return f"{plan.prefix}{self.stems[place]}.{suffix}"

    def _chosen(self) -> set[int]:
        """Places on the contact sheet: all, or as many of each class or prompt as there is room for."""
        num_names, num_each = len(self.asked.names), self.asked.num_each
        shown = max(1, min(num_each, _MOST_ROWS // num_names))
        return {name * num_each + place for name in range(min(num_names, _MOST_ROWS)) for place in range(shown)}

    def _draw(self, costs: Sequence[Cost]) -> Any:
        if not self._clips:
            return None
        names = [label for label in self.asked.labels() for _ in range(self.asked.num_each)]
        rest = "" if len(self._clips) == self.asked.num_samples else f", {len(self._clips)} of {len(names)} clips"
        if len(costs) == 1:
            rows = [ClipRow(clips[0], *names[place]) for place, clips in self._clips.items()]
            return contact_sheet(rows, costs[0].headline + rest)
        rows = [
            ClipRow(
                clip,
                names[place][budget] if budget < 2 else "",  # a long prompt goes on beside the second budget
                f"{costs[budget].relative_flops:.1%} FLOPs, {costs[budget].time}",
            )
            for place, clips in self._clips.items()
            for budget, clip in enumerate(clips)
        ]
        return contact_sheet(rows, _SAME_NOISE + rest)


class VBenchFiles(ClipFiles):
    """Clips in a folder of their own for each budget, named as VBench finds them, and the script that runs it."""

    def __init__(self, out: Path, asked: Asked, saves_latents: bool, fps: float) -> None:
        super().__init__(out, asked, saves_latents, ("mp4",), fps)
        begin = vbench_layout.file_names(asked.prompts)
        self.stems = [f"{name}-{index}" for name in begin for index in range(asked.num_each)]
        self.folders: list[str] = []

    def begin(self, plan: Plan) -> list[str]:
        self.folders.append(_folder(plan))
        return super().begin(plan)

    def _name(self, plan: Plan, place: int, suffix: str) -> str:
        return f"{_folder(plan)}/{self.stems[place]}.{suffix}"

    def finish(self, costs: Sequence[Cost]) -> None:
        super().finish(costs)
        rows = zip(self.stems, self.asked.rows().tolist(), strict=True)
        prompts = {f"{stem}.mp4": self.asked.prompts[row] for stem, row in rows}
        text = json.dumps(prompts, indent=1, ensure_ascii=False)
        script = self.out / vbench_layout.SCRIPT_NAME
        write_atomically(self.out / vbench_layout.PROMPTS_NAME, text.encode())
        write_atomically(script, vbench_layout.script(self.folders).encode())
        self.extra += [vbench_layout.PROMPTS_NAME, script.name]
        self.hints.append(f"VBench, in an environment of its own (see the script): bash {script}")


def _folder(plan: Plan) -> str:
    return f"{plan.prefix}clips"


def make_files(args: argparse.Namespace, asked: Asked, size: Sequence[int], codec: Codec | None) -> SampleFiles:
    """What writes the samples that the arguments ask for.

    Raises:
        ValueError: options for clips where samples are images, formats that are none, VBench without prompts.
    """
    if len(size) == 2:
        given = [name for name in ("clip_format", "fps") if getattr(args, name) is not None]
        given += ["layout"] if args.layout != "numbered" else []
        if given:
            raise ValueError(f"this model makes images, not clips; leave --{given[0].replace('_', '-')} out")
        return ImageFiles(args.out, asked, args.latents)
    fps = _FPS if args.fps is None else args.fps
    if not 0 < fps <= 1000:
        raise ValueError(f"--fps {fps:g} must lie between 0 and 1000")
    if args.layout == "vbench":
        _check_vbench(args, asked, codec)
        return VBenchFiles(args.out, asked, args.latents, fps)
    return ClipFiles(args.out, asked, args.latents, _formats(args.clip_format), fps)


def _check_vbench(args: argparse.Namespace, asked: Asked, codec: Codec | None) -> None:
    if not asked.is_text or codec is None:
        raise ValueError("--layout vbench is for clips of prompts that can be decoded; give --vae")
    if args.clip_format not in (None, "mp4"):
        raise ValueError(f"VBench reads one format from a folder: leave --clip-format {args.clip_format} out")


def _formats(text: str | None) -> tuple[str, ...]:
    formats = CLIP_FORMATS if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for clip_format in formats:
        if clip_format not in CLIP_FORMATS:
            raise ValueError(f"--clip-format {text!r} is not a list of {', '.join(CLIP_FORMATS)}")
    return formats


def _png(image: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
