"""One measured point of a quality-against-FLOPs curve, with all that is needed to measure it again, and its csv."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

from flexidit.files import write_atomically


@dataclass(frozen=True)
class CurvePoint:
    """What was measured and how: one row of ``curve.csv``."""

    series: str
    budget: float
    """Relative FLOPs asked for."""
    relative_flops: float
    """FLOPs relative to the base patch size throughout at the full number of steps."""
    flops_per_image: int
    frechet: float
    """Frechet distance to the reference: of images, or over whole clips."""
    accuracy: float | None
    """Share of samples that the classifier gives their class; None without a classifier."""
    seconds_per_image: float
    """Sampling time on one device, without decoding; depends on batch size and device."""
    schedule: str
    num_sampling_steps: int
    num_samples: int
    evaluator: str
    fingerprint: str
    """Of the evaluator's features."""
    reference: str
    model: str
    """Which weights."""
    codec: str
    solver: str
    cfg_scale: float
    guidance_channels: int | None
    """The first so many channels were guided; None: all."""
    precision: str
    """Type that the model ran in."""
    seed: int
    batch_size: int
    device: str
    agreement: float | None = None
    """Share of what the captions say that measuring the samples confirms; None where nobody can measure it."""
    clip_score: float | None = None
    """100 times the mean cosine of images and texts in a CLIP; None without one."""
    conditions: str = ""
    """What was asked for: which prompts; empty for classes in turn."""
    judges: str = ""
    """Who compared the samples with that, where it is not the evaluator itself."""
    frechet_frames: float | None = None
    """Frechet distance of single frames; None for images, and where it was not measured."""
    flicker: float | None = None
    """Mean temporal flicker in VBench's definition, 1 being none; None for images, and where it was not measured."""
    smoothness: float | None = None
    """Mean motion smoothness in VBench's definition; compares with the same interpolator only."""
    sample: str = "image"
    """What a sample is, "image" or "clip": what FLOPs and seconds "per image" are of."""

    @property
    def a_sample(self) -> str:
        """The same with its article, for labels."""
        return f"an {self.sample}" if self.sample[0] in "aeiou" else f"a {self.sample}"

    def describe(self) -> str:
        """One line that says how the number came about."""
        channels = "" if self.guidance_channels is None else f" on {self.guidance_channels} channels"
        others = "".join(
            f", {name} {value:{style}}"
            for name, value, style in (
                ("per frame", self.frechet_frames, ".4g"),
                ("caption agreement", self.agreement, ".1%"),
                ("CLIP score", self.clip_score, ".2f"),
                ("flicker", self.flicker, ".4f"),
                ("smoothness", self.smoothness, ".4f"),
            )
            if value is not None
        )
        asked = "".join(f"; {part}" for part in (self.conditions, self.judges) if part)
        return (
            f"Frechet distance {self.frechet:.4g}{others} at {self.relative_flops:.1%} FLOPs: "
            f"{self.evaluator}; reference {self.reference}; {self.num_samples} samples{asked}; {self.solver}, "
            f"{self.num_sampling_steps} steps ({self.schedule}); guidance {self.cfg_scale:g}{channels}; {self.codec}; "
            f"{self.precision}; seed {self.seed}"
        )


def write_csv(points: Iterable[CurvePoint], path: str | os.PathLike[str]) -> None:
    """One row a point, whole at every moment: an interrupted write leaves the old file."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(CurvePoint)])
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_atomically(Path(path), text.getvalue().encode())


def read_csv(path: str | os.PathLike[str]) -> list[CurvePoint]:
    """Inverse of :func:`write_csv`; no points where there is no file.

    Files from before there were prompts, or clips, lack the columns about them, and are read too.

    Raises:
        ValueError: the file has other columns.
    """
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = {field.name for field in fields(CurvePoint)}
    needed = {field.name for field in fields(CurvePoint) if field.default is MISSING}
    if any(not needed <= set(row) <= known for row in rows):
        raise ValueError(f"{path} is not a curve of this version: its columns differ; move it away to measure again")
    return [CurvePoint(**{name: _READ.get(name, str)(value) for name, value in row.items()}) for row in rows]


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: read(text) if text else None


_READ: dict[str, Callable[[str], Any]] = {
    "budget": float,
    "relative_flops": float,
    "flops_per_image": int,
    "frechet": float,
    "accuracy": _optional(float),
    "seconds_per_image": float,
    "num_sampling_steps": int,
    "num_samples": int,
    "cfg_scale": float,
    "guidance_channels": _optional(int),
    "seed": int,
    "batch_size": int,
    "agreement": _optional(float),
    "clip_score": _optional(float),
    "frechet_frames": _optional(float),
    "flicker": _optional(float),
    "smoothness": _optional(float),
}


def find_point(points: Iterable[CurvePoint], record: Mapping[str, Any]) -> CurvePoint | None:
    """The first point with all these values."""
    return next((p for p in points if all(getattr(p, name) == value for name, value in record.items())), None)
