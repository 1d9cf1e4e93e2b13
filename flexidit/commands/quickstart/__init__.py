"""``flexidit quickstart``: the paper's story on real data, on a laptop, in minutes."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexidit.commands.quickstart.evaluation import Judge
    from flexidit.commands.quickstart.settings import QuickstartSettings
    from flexidit.metrics.curve_points import CurvePoint
    from flexidit.models.dit import DiT

HELP = (
    "Train a small DiT on scikit-learn's real handwritten digits, make it flexible, fine-tune it, and measure quality "
    "against compute. Interrupted, it continues where it was."
)
EXAMPLE = "flexidit quickstart --out runs/quickstart"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and samples (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the rows as json instead of a table")


def run(args: argparse.Namespace) -> int:
    """Train, fine-tune, measure, draw, explain."""
    from flexidit.commands.quickstart.settings import QuickstartSettings, claim_folder

    settings = QuickstartSettings(seed=args.seed)
    claim_folder(args.out, settings)
    if not args.json:
        tell(settings, args.out)
        return 0
    with redirect_stdout(sys.stderr):  # bars and messages, those of Lightning and of the training modules too
        rows = tell(settings, args.out, quiet=True)
    print(json.dumps(rows, indent=2))
    return 0


def tell(settings: QuickstartSettings, out: Path, *, quiet: bool = False) -> list[dict[str, object]]:
    """The whole story in a folder; returns the rows of its table."""
    from rich.console import Console

    from flexidit.checkpoint import load_checkpoint
    from flexidit.commands.quickstart import story, training
    from flexidit.commands.quickstart.evaluation import Judge

    console = Console()
    target = training.pretrain(settings, out)
    student = load_checkpoint(training.fine_tune(settings, out, target))
    judge = Judge.train(settings)
    points = _measure(student, judge, settings, out, console)
    story.draw_samples(student, settings, out / "samples.png")
    story.draw_curve(points, judge.floor, out / "curve.png")
    page = story.write_report(points, judge, _drift(load_checkpoint(target), settings), settings, out)
    if not quiet:
        story.print_table(points, judge.floor, console)
    console.print(f"Open {page} in a browser; {out}/samples.png and curve.png are in it.", soft_wrap=True)
    return [asdict(row) for row in story.rows(points)]


def _measure(student: DiT, judge: Judge, settings: QuickstartSettings, out: Path, console: object) -> list[CurvePoint]:
    """All points, with a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from flexidit.commands.quickstart.evaluation import measure, schedules

    total = len(schedules(student, settings)) * settings.num_seeds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    points: list[CurvePoint] = []
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:  # type: ignore[arg-type]
        task = bar.add_task("measuring   ", total=total)
        for points in measure(student, judge, settings, out / "curve.csv"):
            bar.update(task, completed=len(points))
    return points


def _drift(target: DiT, settings: QuickstartSettings) -> float:
    """Largest difference that flexifying makes to the target's own prediction, before any training."""
    import torch

    from flexidit.recipes import flexify

    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(10, 1, 8, 8, generator=generator)
    t, y = torch.arange(50, 1000, 95), torch.arange(10)
    student = flexify(target, [settings.weak_patch_size]).eval()
    with torch.no_grad():
        before, after = (model(x, t, y, patch_size=settings.patch_size) for model in (target, student))
    return float((before - after).abs().max())
