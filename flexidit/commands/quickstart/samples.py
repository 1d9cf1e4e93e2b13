"""Pictures of the quick start's samples: the same noise at several budgets."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexidit.clip_files import encode_gif
from flexidit.clip_pictures import ClipRow, ClipsRow, animated_grid, contact_sheet
from flexidit.commands.quickstart.settings import QuickstartSettings
from flexidit.files import write_atomically
from flexidit.metrics.curve_candidates import Candidate
from flexidit.pictures import GridRow, save_grid
from flexidit.recipes import added_parameters
from flexidit.sampling.sampler import Sampler
from flexidit.sampling.schedule import PatchSchedule

_TITLE = "The same noise at several budgets: large patches first, small ones later"


def draw_images(
    model: Any,
    candidates: Sequence[Candidate],
    settings: QuickstartSettings,
    y: Any,
    real: Tensor,
    columns: Sequence[str],
    path: Path,
) -> None:
    """One row per weak-first budget below a row of real digits."""
    grid = [GridRow(real, "real", "scikit-learn's digits")]
    for candidate in candidates:
        if candidate.series == "weak first":
            images = _sample(model, candidate, settings, y)
            grid.append(GridRow(images, f"{candidate.budget:.0%} of the FLOPs", str(candidate.schedule)))
    save_grid(grid, path, _TITLE, columns)


def draw_clips(
    model: Any,
    candidates: Sequence[Candidate],
    settings: QuickstartSettings,
    y: Any,
    texts: Sequence[str],
    out: Path,
) -> None:
    """Each caption at every budget that is given: ``samples.png``, frames side by side; ``samples.gif``, all moving."""
    clips = torch.stack([_sample(model, candidate, settings, y) for candidate in candidates], dim=1)  # (N, K, C, F, ..)
    names = [f"{candidate.budget:.0%} of the FLOPs" for candidate in candidates]
    rows = [
        ClipRow(clip, name if candidate.budget == 1 else f"{name}, {candidate.series}", f'"{text}"')
        for text, own in zip(texts, clips, strict=True)
        for name, candidate, clip in zip(names, candidates, own, strict=True)
    ]
    buffer = BytesIO()
    contact_sheet(rows, _TITLE).save(buffer, format="PNG")
    write_atomically(out / "samples.png", buffer.getvalue())
    beside = [ClipsRow(own, text) for text, own in zip(texts, clips, strict=True)]
    write_atomically(out / "samples.gif", encode_gif(animated_grid(beside, _TITLE, names), fps=4))


def base_is_target(target: Any, student: Any, settings: QuickstartSettings, y: Any) -> str:
    """Whether, at its own patch size, a trained student still draws the target's samples."""
    schedule = PatchSchedule.constant(settings.patch_size, settings.num_sampling_steps)
    ours, theirs = (
        Sampler(model, schedule=schedule, cfg_scale=settings.cfg_scale)(y, generator=torch.Generator().manual_seed(0))
        for model in (student, target)
    )
    verdict = "the same to the last bit" if torch.equal(ours, theirs) else "NOT the same, which is a bug"
    count, share = added_parameters(student)
    return (
        f"What was added has {count} parameters, {share:.1%} of the target's. At the full budget the trained student's "
        f"samples and the target's are {verdict}."
    )


def _sample(model: Any, candidate: Candidate, settings: QuickstartSettings, y: Any) -> Tensor:
    sampler = Sampler(model, schedule=candidate.schedule, cfg_scale=settings.cfg_scale)
    return sampler(y, generator=torch.Generator().manual_seed(settings.seed))
