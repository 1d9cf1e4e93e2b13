"""What every training module shares: patch size and draws of a step, optimizer, validation, what a checkpoint says.

Shape legend: N samples of one process, C H W channels, height and width of what the model sees, L caption tokens,
E width of the text encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from flexidit.conditions import Captions, choose
from flexidit.config import config_to_dict
from flexidit.diffusion.losses import training_loss
from flexidit.diffusion.process import Process, process_of
from flexidit.export import BaseIdentity
from flexidit.models import FlexiTransformer
from flexidit.patch_size import PatchSize
from lightning_modules.data_contract import (
    as_many,
    check_data,
    codec_fingerprint_of,
    null_captions_of,
    text_fingerprint_of,
    warn_of_other_codec,
)
from lightning_modules.draws import SampleDraws, check_weights, draw_patch_size, places
from lightning_modules.further import start_settings
from lightning_modules.generators import RunGenerators
from lightning_modules.gradients import clip_gradients
from lightning_modules.guards import StepGuard
from lightning_modules.noisy_batch import NoisyBatch
from lightning_modules.one_reader import device_of, read_once, read_target
from lightning_modules.run_settings import adopt_optimizer, check_resume, describe_run
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings
from lightning_modules.sharding import GatherDtype, check_gathering, shard, start_moments
from lightning_modules.trained_state import identify_base, keep_trained

GAP_TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
"""Step indices where validation compares weak with powerful predictions (paper, Fig. 4 right)."""


class DiffusionModule(LightningModule, ABC):
    """Trains one model at one of its patch sizes per step; with DiT's loss, unless :meth:`loss` is another.

    A model whose config says ``process="flow"`` is trained as one: straight lines from data to noise, and the squared
    error of the velocity (:mod:`flexidit.diffusion.flow`).

    Subclasses say what the model is, in :meth:`build_model`. Batches are ``{"x": (N, C, H, W), "y": N conditions}``:
    labels (N,), or :class:`Captions`; with ``names``, N strings, their samples can be named.
    Validation gives no weight to batches that are ``repeated``.

    A checkpoint holds all weights. Where the base is frozen (recipe "lora") and comes from ``target.checkpoint``, it
    holds what trains, and says which base that belongs to (:mod:`lightning_modules.trained_state`).

    Args:
        target: the plain model to start from.
        flex: how it becomes flexible; null trains the plain model.
        optimizer: AdamW and its learning rate.
        patch_size_weights: how often each patch size is drawn, relative to the others; null draws all that train
            equally often.
        gradient_checkpointing: recompute each block in backward instead of keeping its activations.
        compile: compile each block, one graph per patch size.
        gather_dtype: of sharded weights (fsdp.yaml) while they are used: "float32", as one process has them, or
            "bfloat16" for half the traffic and memory, with ``precision: bf16-mixed``; shards stay float32.
        vae: local path or hub id of the VAE that decodes samples for pictures and metrics; null: pixels are modelled.
        seed: of fresh weights, patch sizes, timesteps, noise and dropped conditions.
        init_from: start a new run from the (averaged) weights of a flexible checkpoint instead of ``target``; ``flex``
            may add weak patch sizes (:mod:`lightning_modules.further`). No resume: that is ``--ckpt_path``.
    """

    def __init__(
        self,
        target: TargetSettings,
        flex: FlexSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        patch_size_weights: dict[str, float] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        gather_dtype: GatherDtype = "float32",
        vae: str | None = None,
        seed: int = 0,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self._start, self.flex_settings = start_settings(init_from, target, flex), flex
        self.optimizer_settings = optimizer or OptimizerSettings()
        self.patch_size_weights = patch_size_weights
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile
        self.gather_dtype: GatherDtype = gather_dtype
        self.vae, self.seed = vae, seed
        self.process: Process
        self.model: FlexiTransformer
        self.base_identity: BaseIdentity | None = None
        self.step_flops = 0
        self.step_skipped: Tensor | None = None
        """() float32, 1 if the last optimizer step was left out and else 0, on the device; see :class:`StepGuard`."""
        self.allows_changes = False
        """Whether a resume may go on with other settings (``--resume.allow_changes``)."""
        self._null_captions: Captions | None = None
        self._codec: list[Any] = []  # in a list: never a submodule of what is trained
        self._since_logged: dict[str, list[Tensor]] = {}
        self._num_validated = 0
        self._gap: dict[PatchSize, Tensor] = {}
        self._generators = RunGenerators()

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        if self._trainer is not None:
            is_sharded = isinstance(self._strategy, ModelParallelStrategy)
            check_gathering(self.gather_dtype, self.trainer.precision, is_sharded)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            target, source = read_target(self._start, self._strategy)
            self.process = process_of(target.config)
            with device_of(target):
                self.model = self.build_model(target)
        self.model.gradient_checkpointing = self.gradient_checkpointing
        self._weights = self._checked_weights()
        # Before anything shards the weights or changes their type: the hash is that of what target.checkpoint holds.
        self.base_identity = read_once(self._strategy, lambda: identify_base(self.model, source))
        self.strict_loading = self.base_identity is None
        if self.compile_blocks:
            # All blocks share the limit on graphs, 8: sizes times training, validation and sampling can be more.
            limit = 8 * len(self.model.patch_sizes)
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
            for block in self.model.blocks:
                block.compile(dynamic=False)  # with None, the second patch size would get a slower symbolic graph
        if self._trainer is not None:
            self._distribute()

    @abstractmethod
    def build_model(self, target: FlexiTransformer) -> FlexiTransformer:
        """The model to train, before it is moved to a device; the target may become it."""

    @property
    def codec(self) -> Any:
        """Decodes latents for pictures and metrics; the identity where pixels are modelled."""
        if not self._codec:
            from flexidit.latents import LatentCodec, PixelCodec

            pixels = PixelCodec(self.model.in_channels)
            self._codec.append(pixels if self.vae is None else LatentCodec(self.vae, device=self.device))
            if self.vae is not None:
                warn_of_other_codec(codec_fingerprint_of(self._datamodule), self._codec[0].fingerprint)
        return self._codec[0]

    def patch_size_at(self, step: int) -> PatchSize:
        """The patch size of an optimizer step; all micro-batches of the step share it."""
        return draw_patch_size(self.model.patch_sizes, self._weights, self.seed, step)

    def timesteps_of(self, patch_size: PatchSize) -> range:
        """The step indices that a patch size is trained and judged at."""
        return range(self.process.num_timesteps)

    @property
    def judged_patch_sizes(self) -> Sequence[PatchSize]:
        """The patch sizes whose loss validation measures."""
        return self.model.patch_sizes

    def null_condition(self, y: Any) -> Any:
        """What stands in the place of dropped conditions: N labels or captions -> as many of the same kind."""
        return self.model.null_condition(y) if self._null_captions is None else as_many(self._null_captions, y)

    def on_fit_start(self) -> None:
        check_data(self.model.config, self._datamodule)
        null_captions = null_captions_of(self._datamodule, self.model.config)
        self._null_captions = None if null_captions is None else null_captions.to(self.device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        patch_size = self.patch_size_at(self.global_step)
        loss = self.loss(batch, patch_size, self.train_draws(batch, batch_idx))
        self.step_flops = self._step_flops(patch_size)
        self.log("train/loss", loss.detach())
        self.log_sometimes(f"train/loss_{patch_size.name}", loss)
        return loss

    def log_sometimes(self, name: str, value: Tensor) -> None:
        """Log what only some steps have, as its mean since the last logging step.

        ``self.log`` would repeat the last value at every logging step, and miss values that fall between two of them.
        The device is waited for only at the trainer's logging steps, and only by rank 0.
        """
        trainer = self.trainer
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.loggers and interval and trainer.is_global_zero:
            self._since_logged.setdefault(name, []).append(value.detach())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # The step counter has moved on; what Lightning logs now it calls the step before.
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        if is_last:
            self._generators.end_step(self)
        if not (self._since_logged and is_last and self.global_step % interval == 0):
            return
        means = {name: torch.stack(values).mean().item() for name, values in self._since_logged.items()}
        self._since_logged = {}
        for logger in self.loggers:
            logger.log_metrics(means, step=self.global_step - 1)

    def train_draws(self, batch: Mapping[str, Any], batch_idx: int) -> SampleDraws:
        """The draws of a micro-batch of the present step."""
        count = len(batch["y"])
        first = batch_idx % self.trainer.accumulate_grad_batches * count
        return self._draws("train", self.global_step, first, count)

    def loss(self, batch: Mapping[str, Any], patch_size: PatchSize, draws: SampleDraws) -> Tensor:
        """What is minimised, and what validation judges: a scalar. Here DiT's loss, or that of a flow."""
        noisy = self.noised(batch, patch_size, draws)
        output = self.model(noisy.x_t, noisy.times, noisy.y, patch_size=patch_size)
        losses = training_loss(
            self.process, output, noisy.x_start, noisy.x_t, noisy.t, noisy.noise, self.model.learn_sigma
        )
        return losses.total.mean()

    def noised(self, batch: Mapping[str, Any], patch_size: PatchSize, draws: SampleDraws) -> NoisyBatch:
        """The batch at drawn timesteps of the patch size; in training, with some conditions dropped."""
        x_start, y = batch["x"], batch["y"]
        t = draws.timesteps(self.timesteps_of(patch_size), x_start.device)
        noise = draws.noise_like(x_start)
        dropout = self.model.config.class_dropout_prob if self.training else 0.0
        if dropout > 0:
            y = choose(draws.dropped(dropout, y.device), self.null_condition(y), y)
        x_t = self.process.q_sample(x_start, t, noise)
        return NoisyBatch(x_start, noise, x_t, t, self.process.model_timesteps(t), y)

    def on_validation_epoch_start(self) -> None:
        self._num_validated = 0

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        draws = self._draws("validation", 0, self._num_validated, len(batch["y"]))
        self._num_validated += len(batch["y"])
        weight = 0 if batch.get("repeated") else len(batch["y"])  # what keeps ranks in step counts for nothing
        for patch_size in self.judged_patch_sizes:  # every size is judged on the same draws
            loss = self.loss(batch, patch_size, draws)
            self.log(f"val/loss_{patch_size.name}", loss, sync_dist=True, batch_size=weight)
        if batch_idx == 0 and len(self.model.patch_sizes) > 1 and not self.trainer.sanity_checking:
            self._gap = self._measure_gap(batch, draws)

    def on_validation_epoch_end(self) -> None:
        for size, gap in self._gap.items():
            for t, value in zip(GAP_TIMESTEPS, gap.unbind(), strict=True):
                self.log(f"val/gap_{size.name}@t{t:03d}", value, sync_dist=True)
        if self._gap and self.trainer.is_global_zero:
            self._draw_gap()
        self._gap = {}

    def configure_callbacks(self) -> list[Callback]:
        """A guard, if the trainer has none."""
        return [StepGuard()] if StepGuard.of(self.trainer) is None else []

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        settings = self.optimizer_settings
        # Without decay nobody needs to know how long the run is, and it may be endless.
        max_steps = self.trainer.estimated_stepping_batches if settings.decay == "cosine" else 0
        # A loss scaler (16-mixed) and clipping do not get along with the fused kernel, which unscales by itself.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer, schedule = settings.build(parameters, max_steps, fused=not scaled)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            start_moments(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip with a fused optimizer under bf16-mixed (Lightning #21435); torch does not mind.
        norm = clip_gradients(self.parameters(), gradient_clip_val, gradient_clip_algorithm)
        self.log("train/grad_norm", norm)
        guard = StepGuard.of(self.trainer)
        self.step_skipped = None if guard is None else guard.judge(self, optimizer, norm)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights; without a base that checkpoints name instead of holding it."""
        state = super().state_dict(*args, **kwargs)
        return state if self.base_identity is None else keep_trained(state, self, kwargs.get("prefix", ""))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values only: LightningCLI reads checkpoints with weights_only=True.
        checkpoint["flexidit"] = {
            "config": config_to_dict(self.model.config),
            "base": None if self.base_identity is None else asdict(self.base_identity),
            "text": text_fingerprint_of(self._datamodule, self.model.config),
            "codec": codec_fingerprint_of(self._datamodule),
            "run": describe_run(self),
            "generators": self._generators.save(self),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_resume(checkpoint, self)
        self._generators.load(checkpoint.get("flexidit", {}).get("generators", []))

    def on_train_start(self) -> None:
        self._generators.start(self, key=(self.seed, self.global_step))
        adopt_optimizer(self)

    def on_validation_model_eval(self) -> None:
        self._generators.enter_validation(self)
        super().on_validation_model_eval()

    def on_validation_end(self) -> None:
        self._generators.leave_validation(self)

    @property
    def resume_settings(self) -> dict[str, Any]:
        """What a resume compares; see :mod:`lightning_modules.run_settings`."""
        names = ("seed", "patch_size_weights")
        return {"optimizer": asdict(self.optimizer_settings), **{name: getattr(self, name) for name in names}}

    @property
    def _strategy(self) -> Strategy | None:
        return None if self._trainer is None else self._trainer.strategy

    @property
    def _datamodule(self) -> Any:
        return None if self._trainer is None else getattr(self._trainer, "datamodule", None)

    @property
    def _is_frozen(self) -> bool:
        """Whether only what a weak size adds is trained."""
        flex = self.model.config.flex
        return flex is not None and flex.recipe == "lora"

    @property
    def _trains_in_turns(self) -> bool:
        """Whether a step leaves out some of what trains: all but the parts of one patch size."""
        return len(self.model.patch_sizes) > (2 if self._is_frozen else 1)

    def _distribute(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            shard(self.model, self.device_mesh, self.gather_dtype)
        elif isinstance(strategy, DDPStrategy) and self._trains_in_turns:
            # What belongs to other patch sizes gets no gradient in a step, and AdamW must skip it as it does in one
            # process: a gradient of zero would let its momentum move it. Looking for it costs less than zeros in its
            # place (two gloo processes, 5 M in 202 tensors of two adapters, least of 20 steps: 151 ms, zeros 164);
            # reducing only the gradients at hand, without DDP's reducer, 142 ms, but nothing of it beside backward.
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def _checked_weights(self) -> list[float]:
        """One weight per patch size of the model, base first."""
        sizes = self.model.patch_sizes
        trained = [size for size in sizes if not (self._is_frozen and size == self.model.base_patch_size)]
        return check_weights(self.patch_size_weights, sizes, trained)

    def _draws(self, stream: str, step: int, first: int, count: int) -> SampleDraws:
        world_size = self.trainer.world_size
        return SampleDraws(self.seed, stream, step, places(first, count, self.global_rank, world_size))

    def _measure_gap(self, batch: Mapping[str, Any], draws: SampleDraws) -> dict[PatchSize, Tensor]:
        from flexidit.analysis.gap import weak_powerful_gap

        noise, y = draws.noise_like(batch["x"]), self.model.prepare(batch["y"])
        return weak_powerful_gap(self.model, self.process, batch["x"], y, noise, GAP_TIMESTEPS)

    def _draw_gap(self) -> None:
        from flexidit.plots import gap_figure

        for board in self._tensorboards():
            board.add_figure("val/gap", gap_figure(GAP_TIMESTEPS, self._gap), self.global_step)

    def _tensorboards(self) -> Iterator[Any]:
        writers = (getattr(logger, "experiment", None) for logger in self.loggers)
        return (writer for writer in writers if hasattr(writer, "add_figure"))

    def _step_flops(self, patch_size: PatchSize) -> int:
        """Of one sample, forward and backward."""
        # Backward costs twice the forward; with frozen weights the half of it that is their gradient falls away.
        return (2 if self._is_frozen else 3) * self._forward_flops(patch_size)

    def _forward_flops(self, patch_size: PatchSize) -> int:
        from flexidit.flops import forward_flops

        return forward_flops(self.model, patch_size, merged=False)
