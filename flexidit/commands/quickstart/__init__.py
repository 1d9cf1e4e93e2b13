"""``flexidit quickstart``: the paper's story on real data, on a laptop, in minutes."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexidit.commands.quickstart.judge import Judge
    from flexidit.commands.quickstart.recipe import Recipe
    from flexidit.commands.quickstart.settings import QuickstartSettings
    from flexidit.metrics.curve_points import CurvePoint

HELP = (
    "Train a small transformer on scikit-learn's real handwritten digits, make it flexible, train it further, and "
    "measure quality against compute. Interrupted, it continues where it was."
)
EXAMPLE = "flexidit quickstart --recipe text-to-image"
RECIPES = {
    "class-conditional": "runs/quickstart",
    "text-to-image": "runs/quickstart_text_to_image",
    "text-to-video": "runs/quickstart_text_to_video",
}
"""Folders of the runs, by recipe."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default=next(iter(RECIPES)),
        help="labels and full fine-tuning, captions and a distilled adapter, or captioned clips and adapters in time "
        "and in space (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help=f"folder of the run ({', or '.join(RECIPES.values())})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and samples (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the rows as json instead of a table")


def run(args: argparse.Namespace) -> int:
    """Train, tune, measure, draw, explain."""
    from flexidit.commands.quickstart.settings import SETTINGS, claim_folder

    settings = SETTINGS[args.recipe](args.seed)
    out = args.out or Path(RECIPES[args.recipe])
    claim_folder(out, settings)
    if not args.json:
        tell(settings, out)
        return 0
    with redirect_stdout(sys.stderr):  # bars and messages, those of Lightning and of the training modules too
        rows = tell(settings, out, quiet=True)
    print(json.dumps(rows, indent=2))
    return 0


def tell(settings: QuickstartSettings, out: Path, *, quiet: bool = False) -> list[dict[str, object]]:
    """The whole story in a folder; returns the rows of its table."""
    from rich.console import Console

    from flexidit.checkpoint import load_checkpoint
    from flexidit.commands.quickstart import story, training

    console, recipe = Console(), _recipe(settings)
    training.train(recipe, out)
    target, student = (load_checkpoint(out / f"{name}.safetensors") for name in ("target", "student"))
    judge, sampled = recipe.judge(), recipe.sampled(student)
    points = _measure(sampled, judge, recipe, out, console)
    pictures = recipe.draw_samples(sampled, out)
    story.draw_curve(points, judge.floor, recipe, out / "curve.png")
    page = story.write_report(points, judge, recipe.promise(target, student), pictures, recipe, out)
    if not quiet:
        story.print_table(points, judge.floor, recipe, console)
    console.print(f"Open {page} in a browser; {out}/samples.png and curve.png are in it.", soft_wrap=True)
    return [asdict(row) for row in story.rows(points)]


def _recipe(settings: QuickstartSettings) -> Recipe[Any]:
    module = importlib.import_module(f"flexidit.commands.quickstart.{settings.recipe.replace('-', '_')}")
    return module.RECIPE(settings)


def _measure(model: Any, judge: Judge, recipe: Recipe[Any], out: Path, console: object) -> list[CurvePoint]:
    """All points, with a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from flexidit.commands.quickstart.evaluation import measure

    total = len(recipe.schedules(model)) * recipe.settings.num_seeds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    points: list[CurvePoint] = []
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:  # type: ignore[arg-type]
        task = bar.add_task("measuring   ", total=total)
        for points in measure(model, judge, recipe, out / "curve.csv"):
            bar.update(task, completed=len(points))
    return points
