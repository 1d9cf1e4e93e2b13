"""One sampling loop, for any model, schedule of patch sizes, guidance and diffusers solver.

Shape legend: N samples, n samples in one batch, C latent channels, H W latent height and width (F H W for clips).
Time runs from t = num_train_timesteps - 1 (noise) to t = 0 (data); of a flow, from num_train_timesteps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flexidit.conditions import Captions, Condition
from flexidit.patch_size import PatchSize
from flexidit.sampling import solvers
from flexidit.sampling.batches import Batch, draw_batches, draw_seeds
from flexidit.sampling.denoiser import Denoiser, device_of, dtype_of, eval_mode, process_of, time_shift_of
from flexidit.sampling.guidance import (
    Branch,
    BranchConditions,
    check_negative,
    combine,
    coupled_weak_scale,
    predict_pair,
    scale_of,
)
from flexidit.sampling.packing import PackingDenoiser, PackingName, packing_of
from flexidit.sampling.schedule import PatchSchedule, ScheduleStep
from flexidit.token_layout import BlockWork, Packing, Segment


@dataclass(frozen=True)
class Call:
    """One batch of predictions at one patch size that ran: a forward pass, or what it packed of that size."""

    step: int
    """Index into the schedule."""
    timestep: float
    """Train timestep that the model was told."""
    patch_size: PatchSize
    branch: Branch
    """"cond", "weak" (the weaker size, guiding) or "cond+uncond" (both in one batch)."""
    num_sequences: int
    """Sequences in the batch: both branches, and copies that fill the batch, counted."""
    work: BlockWork | None = None
    """What the model's blocks computed where packing has added to it; ``None``: these sequences, each by itself."""
    num_prepared: int | None = None
    """Captions prepared before the call, for it and for those that follow, which have 0; ``None``: the call worked
    through its own captions, or there are none."""


OnStep = Callable[[int, Tensor], None]


class Sampler:
    """Draws samples from a model; call it with conditions.

    A sample depends on its condition and its place in the draw from the generator alone: neither on ``batch_size``
    nor on what else is sampled beside it (up to the model's own rounding). Eight samples at once are two calls of
    four with the same generator continuing.

    Example:
        >>> from flexidit import create_model
        >>> model = create_model("DiT-Tiny/2", num_classes=10, input_size=8)
        >>> sampler = Sampler(model, schedule=PatchSchedule.constant(2, num_steps=3), cfg_scale=4.0)
        >>> sampler(torch.tensor([1, 2]), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 4, 8, 8])
        >>> [(call.timestep, call.branch, call.num_sequences) for call in sampler.trace]
        [(999, 'cond+uncond', 4), (500, 'cond+uncond', 4), (0, 'cond+uncond', 4)]
    """

    def __init__(
        self,
        model: Denoiser,
        solver: str | solvers.Solver | None = None,
        *,
        schedule: PatchSchedule,
        cfg_scale: float = 1.0,
        weak_guidance_scale: float | None = None,
        guidance_channels: int | None = None,
        num_train_timesteps: int = 1000,
        time_shift: float | None = None,
        packing: PackingName = "separate",
        autocast: torch.dtype | None = None,
        cache_captions: bool = True,
        progress: bool = False,
    ) -> None:
        """Set up sampling; nothing runs yet.

        Args:
            model: predicts the noise, and the variance if ``model.learn_sigma``; or the velocities of a flow.
            solver: "ddpm", "ddim", "dpm++", "sa" or a diffusers scheduler; for a flow "unipc", "euler", "dpm++" or a
                diffusers scheduler of flows; see :func:`solvers.make_solver`. ``None``: the first of these.
            schedule: patch size of each step; its length is the number of steps.
            cfg_scale: classifier-free guidance at steps whose two patch sizes are equal; 1.0: none, and no
                guiding call is made.
            weak_guidance_scale: guidance by the weaker size at the other steps; ``None``: coupled to ``cfg_scale``
                by the paper's rule; 1.0: none.
            guidance_channels: guide only the first so many latent channels; ``None``: all, 3: official DiT.
            num_train_timesteps: length of the noise schedule that the model was trained on.
            time_shift: of a flow, how far its noise levels are shifted towards noise; ``None``: as in training.
            packing: how the predictions of a step with two patch sizes become forward passes; see :mod:`.packing`.
            autocast: run the model under autocast to this dtype; ``None``: in the dtype of its parameters.
            cache_captions: compute keys and values of cross-attention once per batch of a run, not at every step; the
                samples are the same. It keeps depth x 4 n L D numbers (PixArt-XL/2: 31 MB per guided sample in
                bfloat16).
            progress: show a progress bar with the time left.

        Raises:
            ValueError: a patch size that the model does not have, channels that do not exist, an impossible solver,
                a packing for a model that cannot pack.
        """
        self.model = model
        self.process = process_of(model)
        self.solver = solvers.default_solver(self.process) if solver is None else solver
        self.schedule = schedule
        self.cfg_scale = cfg_scale
        self.weak_guidance_scale = coupled_weak_scale(cfg_scale) if weak_guidance_scale is None else weak_guidance_scale
        self.guidance_channels = guidance_channels
        self.num_train_timesteps = num_train_timesteps
        is_told = time_shift is None and self.process == "flow" and isinstance(self.solver, str)
        self.time_shift = time_shift_of(model) if is_told else time_shift
        self.packing = packing
        self.autocast = autocast
        self.cache_captions = cache_captions
        self.progress = progress
        self.trace: list[Call] = []
        """What the latest call ran, batch after batch; ``flops.trace_cost`` prices it."""
        self._check()

    @property
    def solver_name(self) -> str:
        """The solver in words, for records."""
        return solvers.describe(self.solver, self.time_shift)

    @property
    def is_guided(self) -> bool:
        """Whether any step makes a guiding call."""
        return any(self._scale(step) != 1 for step in self.schedule)

    @property
    def _is_unconditional(self) -> bool:
        """Whether any step makes an unconditional prediction."""
        return any(step.cond == step.guide and self._scale(step) != 1 for step in self.schedule)

    @property
    def num_prepared(self) -> int:
        """How many captions the latest call prepared, those of the unconditional branch and copies counted."""
        return sum(call.num_prepared or 0 for call in self.trace)

    @torch.no_grad()  # not inference_mode: its tensors could not enter a loss later, and it recompiles the model
    def __call__(
        self,
        y: Tensor | Captions | Sequence[int],
        *,
        negative: Tensor | Captions | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        size: Sequence[int] | None = None,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """One sample per condition: N conditions -> (N, C, H, W) float32 on the model's device.

        Args:
            y: N conditions: class labels, which may be a list, or captions. They are moved to the device batch by
                batch.
            negative: what to guide away from, instead of the model's null condition: N of y's kind, or one for all.
                Weights without a null caption need it. Not looked at where no step makes an unconditional prediction.
            generator: yields one seed per sample; ``None``: the global one. Noise is drawn on the model's device,
                so that no step waits for the CPU: another kind of device gives other noise from the same seed.
            noise: (N, C, H, W) initial noise, left unchanged; ``None``: drawn. The noise of later steps still comes
                from ``generator``, and is the same with or without this argument.
            size: latent size; ``None``: that of ``noise``, else of the model.
            batch_size: samples in one forward pass (twice as many sequences with guidance). The last batch is filled
                up to it with copies, which are dropped at the end but do run and are in the trace: a compiled
                model then sees one shape only. ``None``: all N at once.
            device: where to sample; ``None``: where the model's parameters are.
            on_step: called as ``on_step(step, x)`` after each step of each batch, with the (n, C, H, W) state.

        Raises:
            ValueError: noise, sizes or negative conditions that do not fit, or a batch size below one.
        """
        home = device_of(self.model) if device is None else torch.device(device)
        y = y if isinstance(y, Captions) else torch.as_tensor(y)
        if negative is not None:
            check_negative(y, negative)
        shape = (len(y), self.model.in_channels, *self._latent_size(size, noise, len(y)))
        seeds = draw_seeds(len(y), generator)
        self.trace = []
        with eval_mode(self.model), _progress_bar(self.progress) as advance:
            batches = [
                self._run_batch(batch, on_step, advance)
                for batch in draw_batches(y, negative, seeds, noise, shape, batch_size, home)
            ]
        return torch.cat(batches) if batches else torch.empty(shape, device=home)

    def _run_batch(self, batch: Batch, on_step: OnStep | None, advance: Callable[[int], None]) -> Tensor:
        """The sampling loop: (n, C, H, W) noise to data, without the padding."""
        solver = self._make_solver()
        random = {"generator": batch.generators} if solvers.takes_generator(solver) else {}
        told = self._conditions(batch)
        x = solvers.initial_sample(solver, batch.noise)  # (n, C, H, W) float32
        for index, (step, timestep) in enumerate(zip(self.schedule, solver.timesteps, strict=True)):
            _mark_cudagraph_step()
            shown = solvers.model_input(solver, x, timestep)  # (n, C, H, W)
            prediction = self._predict(index, step, shown, timestep, told)  # (n, C or 2C, H, W)
            if not solvers.uses_variance(solver):
                prediction = prediction[:, : self.model.in_channels]
            x = solver.step(prediction, timestep, x, return_dict=False, **random)[0]
            if on_step is not None:
                on_step(index, x[: batch.num_real])
            advance(len(self.schedule) * batch.num_batches)
        return x[: batch.num_real]

    def _conditions(self, batch: Batch) -> BranchConditions:
        """What the model is told in this run, with what no step changes about it computed."""
        null_y = None
        if self._is_unconditional:
            null_y = self.model.null_condition(batch.y) if batch.negative is None else batch.negative
        prepare = getattr(self.model, "prepare", None) if self.cache_captions else None
        with self._cast(batch.noise.device):
            return BranchConditions.of(batch.y, null_y, prepare or _as_given)

    def _predict(self, index: int, step: ScheduleStep, x: Tensor, timestep: Tensor, told: BranchConditions) -> Tensor:
        """Guided prediction of one step, (n, C or 2C, H, W) float32; records its calls."""
        value = timestep.item()  # on the CPU, so no device waits
        if self.process == "flow":
            value = float(value)  # whole numbers of some solvers too: one type of t, and one compiled graph
        t = torch.full((len(x),), value, device=x.device)  # (n,)

        def forward(x: Tensor, t: Tensor, y: Condition, *, patch_size: PatchSize, branch: Branch) -> Tensor:
            self.trace.append(Call(index, value, patch_size, branch, len(x), None, told.prepared_for(index, branch)))
            return self._forward(x, t, y, patch_size)

        scale = self._scale(step)
        if scale == 1:
            return forward(x, t, told.cond, patch_size=step.cond, branch="cond")
        packing = packing_of(self.packing)
        if packing is None or step.cond == step.guide:
            cond, guiding = predict_pair(forward, x, t, told, step)
        else:
            self.trace += _packed_calls(index, value, step, x, told, packing)
            cond, guiding = self._forward_packed(x, t, told.cond, (step.cond, step.guide), packing)
        channels = self.guidance_channels
        return combine(cond, guiding, scale, in_channels=self.model.in_channels, guidance_channels=channels)

    def _forward(self, x: Tensor, t: Tensor, y: Condition, patch_size: PatchSize) -> Tensor:
        """The model in its own dtype, its answer in float32, where guidance and solver work."""
        with self._cast(x.device):
            output = self.model(x.to(dtype_of(self.model)), t, y, patch_size=patch_size)
        return output.to(torch.float32, copy=True)  # a CUDA graph overwrites its output at the next call

    def _forward_packed(
        self, x: Tensor, t: Tensor, y: Condition, patch_sizes: Sequence[PatchSize], packing: Packing
    ) -> list[Tensor]:
        """The predictions of several sizes for the same latents, in one pass; otherwise as :meth:`_forward`."""
        model, x, count = cast(PackingDenoiser, self.model), x.to(dtype_of(self.model)), len(patch_sizes)
        with self._cast(x.device):
            outputs = model([x] * count, [t] * count, [y] * count, patch_size=patch_sizes, packing=packing)
        return [output.to(torch.float32, copy=True) for output in outputs]

    def _cast(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)

    def _scale(self, step: ScheduleStep) -> float:
        return scale_of(step, self.cfg_scale, self.weak_guidance_scale)

    def _make_solver(self) -> solvers.Solver:
        return solvers.make_solver(
            self.solver,
            len(self.schedule),
            num_train_timesteps=self.num_train_timesteps,
            learn_sigma=self.model.learn_sigma,
            process=self.process,
            time_shift=self.time_shift,
        )

    def _latent_size(self, size: Sequence[int] | None, noise: Tensor | None, num_samples: int) -> tuple[int, ...]:
        if noise is None:
            return tuple(self.model.input_size if size is None else size)
        given = tuple(noise.shape[2:]) if size is None else tuple(size)
        needed = (num_samples, self.model.in_channels, *given)
        if tuple(noise.shape) != needed:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; for these conditions it must have shape {needed}")
        return given

    def _check(self) -> None:
        known = [PatchSize.parse(size) for size in self.model.patch_sizes]
        used = [step.cond for step in self.schedule] + [s.guide for s in self.schedule if self._scale(s) != 1]
        missing = sorted(set(used) - set(known))
        if missing:
            raise ValueError(
                f"the schedule uses patch size {', '.join(map(str, missing))}, but the model has "
                f"{', '.join(map(str, known))}; change the schedule or flexify the model"
            )
        channels = self.guidance_channels
        if channels is not None and not 1 <= channels <= self.model.in_channels:
            raise ValueError(f"guidance_channels={channels} must lie between 1 and {self.model.in_channels}")
        if packing_of(self.packing) is not None and not getattr(self.model, "can_pack", False):
            raise ValueError(
                f"packing={self.packing!r} needs a model that runs several patch sizes in one pass, which "
                f"{type(self.model).__name__} does not (merged adapters make its sizes different weights); "
                "give packing='separate'"
            )
        self._make_solver()


def _as_given(y: Any) -> Any:
    return y


def _packed_calls(
    index: int, timestep: float, step: ScheduleStep, x: Tensor, told: BranchConditions, packing: Packing
) -> list[Call]:
    """What one packed pass adds to the trace."""
    layout = packing([Segment(size, len(x), size.num_tokens(x.shape[2:])) for size in (step.cond, step.guide)])
    branches: tuple[tuple[PatchSize, Branch], ...] = ((step.cond, "cond"), (step.guide, "weak"))
    return [
        Call(index, timestep, size, branch, len(x), layout.work(segment), told.prepared_for(index, branch))
        for segment, (size, branch) in enumerate(branches)
    ]


@contextmanager
def _progress_bar(show: bool) -> Iterator[Callable[[int], None]]:
    """A function to call once per step with the total number of steps."""
    if not show:
        yield lambda total: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("sampling", total=None)
        yield lambda total: bar.update(task, total=total, advance=1)


def _mark_cudagraph_step() -> None:
    """Tell CUDA graphs, if any can exist, that the outputs of the previous step may be overwritten."""
    if "torch._inductor.cudagraph_trees" in sys.modules:  # otherwise the call would import a compiler for nothing
        torch.compiler.cudagraph_mark_step_begin()
