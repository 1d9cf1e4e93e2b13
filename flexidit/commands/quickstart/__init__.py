"""``flexidit quickstart``: the paper's story on real data, on a laptop, in minutes."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from flexidit.commands.quickstart.evaluation import Judge
    from flexidit.commands.quickstart.recipe import Recipe
    from flexidit.commands.quickstart.settings import (
        ClassConditionalSettings,
        QuickstartSettings,
        TextToImageSettings,
    )
    from flexidit.metrics.curve_points import CurvePoint

HELP = (
    "Train a small transformer on scikit-learn's real handwritten digits, make it flexible, train it further, and "
    "measure quality against compute. Interrupted, it continues where it was."
)
EXAMPLE = "flexidit quickstart --recipe text-to-image"
RECIPES = ("class-conditional", "text-to-image")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default=RECIPES[0],
        help="labels and full fine-tuning, or captions and a distilled adapter (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the run (runs/quickstart, or runs/quickstart_text_to_image)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and samples (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the rows as json instead of a table")


def run(args: argparse.Namespace) -> int:
    """Train, tune, measure, draw, explain."""
    from flexidit.commands.quickstart import settings as choices

    is_text = args.recipe == "text-to-image"
    settings: QuickstartSettings
    settings = choices.TextToImageSettings(args.seed) if is_text else choices.ClassConditionalSettings(args.seed)
    out = args.out or Path("runs/quickstart_text_to_image" if is_text else "runs/quickstart")
    choices.claim_folder(out, settings)
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
    from flexidit.commands.quickstart.evaluation import Judge

    console, recipe = Console(), _recipe(settings)
    target = training.pretrain(recipe, out)
    student = load_checkpoint(training.tune(recipe, out, target))
    judge, sampled = Judge.train(settings), recipe.sampled(student)
    points = _measure(sampled, judge, recipe, out, console)
    story.draw_samples(sampled, recipe, out / "samples.png")
    story.draw_curve(points, judge.floor, recipe, out / "curve.png")
    page = story.write_report(points, judge, recipe.promise(load_checkpoint(target), student), recipe, out)
    if not quiet:
        story.print_table(points, judge.floor, recipe, console)
    console.print(f"Open {page} in a browser; {out}/samples.png and curve.png are in it.", soft_wrap=True)
    return [asdict(row) for row in story.rows(points)]


def _recipe(settings: QuickstartSettings) -> Recipe[Any]:
    if settings.has_captions:
        from flexidit.commands.quickstart.text_to_image import TextToImageRecipe

        return TextToImageRecipe(cast("TextToImageSettings", settings))
    from flexidit.commands.quickstart.class_conditional import ClassConditionalRecipe

    return ClassConditionalRecipe(cast("ClassConditionalSettings", settings))


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

    from flexidit.commands.quickstart.evaluation import measure, schedules

    total = len(schedules(model, recipe.settings)) * recipe.settings.num_seeds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    points: list[CurvePoint] = []
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:  # type: ignore[arg-type]
        task = bar.add_task("measuring   ", total=total)
        for points in measure(model, judge, recipe, out / "curve.csv"):
            bar.update(task, completed=len(points))
    return points
