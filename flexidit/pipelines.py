"""A flexible Wan as a stock ``diffusers.WanPipeline``: one mode down to a noise level, another from there on.

Since Wan 2.2 that pipeline has two transformers, which take turns once: ``transformer`` while the timestep is at least
``boundary_ratio`` times the number of training steps, ``transformer_2`` below. That is a schedule of two stages.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexidit.checkpoint import save_checkpoint
from flexidit.config import TransformerConfig, WanConfig
from flexidit.layouts import layout_of_config
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize
from flexidit.recipes import plain_copy
from flexidit.sampling.schedule import PatchSchedule
from flexidit.sampling.solvers import Solver, make_solver
from flexidit.weight_files import read_json, save_json

PIPELINE_CLASS = "WanPipeline"
INDEX = "model_index.json"
TRANSFORMERS = ("transformer", "transformer_2")

_SCHEDULER = "scheduler"
_OWN = (*TRANSFORMERS, _SCHEDULER)


@dataclass(frozen=True)
class StockPipeline:
    """The folder of a ``WanPipeline``, from which everything but the transformers is taken."""

    folder: Path
    index: Mapping[str, Any]
    """What its ``model_index.json`` holds."""

    @classmethod
    def read(cls, folder: Path) -> StockPipeline:
        """Look at a folder; no weight is read.

        Raises:
            FileNotFoundError, ValueError: it is not that of such a pipeline, or of a kind that has no two stages.
        """
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"{folder} has no {INDEX}; give the local folder of a {PIPELINE_CLASS}")
        index = read_json(folder / INDEX)
        if index.get("_class_name") != PIPELINE_CLASS:
            raise ValueError(f"{folder} is a {index.get('_class_name')}; give the folder of a {PIPELINE_CLASS}")
        if index.get("expand_timesteps"):
            raise ValueError(
                f"{folder} tells its transformer the time token by token (Wan 2.2 TI2V), which none here is"
            )
        return cls(folder, index)

    @property
    def parts(self) -> list[str]:
        """Folders that are taken over as they are."""
        named = [name for name, value in self.index.items() if isinstance(value, list) and value[0] is not None]
        return [name for name in named if name not in _OWN]

    def check_fits(self, config: WanConfig) -> None:
        """Refuse a pipeline whose other parts are of another model.

        Raises:
            ValueError: latents or captions have another width than the model's.
        """
        widths = {"vae": ("z_dim", config.in_channels), "text_encoder": ("d_model", config.caption_channels)}
        for part, (field, expected) in widths.items():
            file = self.folder / part / "config.json"
            given = read_json(file).get(field, expected) if file.is_file() else expected
            if given != expected:
                raise ValueError(f"{file} says {field}={given} and the model takes {expected}; give its own pipeline")

    def scheduler(self) -> Solver:
        """Its scheduler, as configured.

        Raises:
            FileNotFoundError, ValueError: there is none, or none of diffusers.
        """
        import diffusers

        file = self.folder / _SCHEDULER / "scheduler_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; give the folder of a whole {PIPELINE_CLASS}, or a solver")
        values = read_json(file)
        kind = getattr(diffusers, str(values.get("_class_name")), None)
        if kind is None:
            raise ValueError(f"{file} is of a {values.get('_class_name')}, which diffusers does not have")
        return kind.from_config(values)


def pipeline_scheduler(
    stock: StockPipeline, config: WanConfig, solver: str | None = None, time_shift: float | None = None
) -> Solver:
    """The scheduler of the exported pipeline.

    Args:
        stock: whose scheduler it is, unless ``solver`` says otherwise.
        config: of the model.
        solver: "unipc", "euler" or "dpm++"; None takes the pipeline's.
        time_shift: how far noise levels are shifted towards noise; None: as the pipeline's scheduler does, or of a
            ``solver`` as the model was trained.

    Raises:
        ValueError: an unknown solver, or an impossible shift.
    """
    if time_shift is not None and not 0 < time_shift < math.inf:
        raise ValueError(f"a time shift is a number above 0, and 1 shifts nothing; got {time_shift}")
    if solver is not None:
        shift = config.time_shift if time_shift is None else time_shift
        return make_solver(solver, 1, process="flow", time_shift=shift)
    scheduler = stock.scheduler()
    if time_shift is None:
        return scheduler
    name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    return type(scheduler).from_config({**scheduler.config, name: time_shift})


def two_stages(schedule: PatchSchedule) -> tuple[PatchSize, PatchSize, int]:
    """Patch sizes of the two transformers, and how many steps the first one takes.

    Raises:
        ValueError: a schedule that a stock pipeline does not follow.

    Example:
        >>> first, second, steps = two_stages(PatchSchedule.parse("2x2x2:30,1x2x2:20"))
        >>> first.name, second.name, steps
        ('2x2x2', '1x2x2', 30)
    """
    stages = schedule.stages()
    if len(stages) != 2 or any(step.cond != step.guide for step in schedule):
        raise ValueError(
            f"a stock {PIPELINE_CLASS} switches once, between two patch sizes that guide themselves, and not as "
            f"{schedule} does; give two stages such as 2x2x2:30,1x2x2:20"
        )
    (first, steps), (second, _) = stages
    return first.cond, second.cond, steps


def boundary_ratio(scheduler: Solver, num_steps: int, first_steps: int) -> float:
    """Between the last timestep of the first stage and the first one of the second, relative to those of training.

    Raises:
        ValueError: a scheduler for another process, or one that tells both the same time.
    """
    solver = make_solver(scheduler, num_steps, process="flow")
    last, following = (float(solver.timesteps[i]) for i in (first_steps - 1, first_steps))
    if last <= following:
        raise ValueError(
            f"{type(solver).__name__} tells the model the same time before and after step {first_steps} of "
            f"{num_steps}, so no boundary lies between; take fewer steps, or a smaller time shift"
        )
    return (last + following) / 2 / solver.config.num_train_timesteps


def save_wan_pipeline(
    student: FlexiTransformer,
    folder: Path,
    stock: StockPipeline,
    schedule: PatchSchedule,
    *,
    scheduler: Solver,
    link: bool = False,
) -> dict[str, Any]:
    """Write the folder of a ``WanPipeline`` that follows a schedule of two patch sizes of a student.

    Args:
        student: its weak sizes must be placed at their indices (``positions="grid"``) and divide ``input_size``.
        folder: new, or empty.
        stock: where everything but the transformers comes from.
        schedule: of two stages; its length is the ``num_inference_steps`` that the boundary is made for.
        scheduler: see :func:`pipeline_scheduler`.
        link: symbolic links to the parts of ``stock`` instead of copies.

    Returns:
        What the pipeline is to be called with: ``num_inference_steps``; and ``boundary_ratio``.

    Raises:
        ValueError: a model, a schedule or a folder that cannot be used; nothing is written then.
    """
    first, second, first_steps = two_stages(schedule)
    config = check_expressible(student.config, (first, second))
    stock.check_fits(config)
    sizes = dict(zip(TRANSFORMERS, (student.check_patch_size(size) for size in (first, second)), strict=True))
    ratio = boundary_ratio(scheduler, len(schedule), first_steps)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and might hold what would be lost; give a new folder")
    for name, size in sizes.items():
        save_checkpoint(plain_copy(student, size), folder / name, layout_format="diffusers")
    scheduler.save_pretrained(folder / _SCHEDULER)
    for part in stock.parts:
        _take(stock.folder / part, folder / part, link)
    save_json({**stock.index, **_entries(scheduler), "boundary_ratio": ratio}, folder / INDEX)
    return {"boundary_ratio": ratio, "num_inference_steps": len(schedule)}


def check_expressible(config: TransformerConfig, sizes: tuple[PatchSize, ...]) -> WanConfig:
    """The config, if it is a Wan's whose patches of these sizes stock code computes.

    Raises:
        ValueError: it is not; the sentence says why.
    """
    if not isinstance(config, WanConfig):
        raise ValueError(f"a {PIPELINE_CLASS} runs models of the family Wan, not a {type(config).__name__[:-6]}")
    for size in sizes:
        layout_of_config(config).config_to_diffusers(config.plain(size))
    return config


def _entries(scheduler: Solver) -> dict[str, list[str]]:
    """Of the parts that are our own, in the index."""
    kind = layout_of_config(WanConfig()).CLASS_NAME
    return {
        **{name: ["diffusers", kind] for name in TRANSFORMERS},
        _SCHEDULER: ["diffusers", type(scheduler).__name__],
    }


def _take(source: Path, target: Path, link: bool) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is missing, though {INDEX} lists it; fetch the pipeline again")
    if link:
        target.symlink_to(source.resolve(), target_is_directory=True)
    else:
        shutil.copytree(source, target)
