"""What every training module shares: patch size and draws of a step, optimizer, validation, what a checkpoint says.

Shape legend: N samples of one process, C H W channels, height and width of what the model sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexidit.conditions import choose
from flexidit.config import config_to_dict
from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.diffusion.losses import diffusion_loss
from flexidit.models.dit import DiT
from flexidit.patch_size import PatchSize
from lightning_modules.draws import SampleDraws, draw_patch_size, places
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

GAP_TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
"""Where validation compares weak with powerful predictions (paper, Fig. 4 right)."""


class DiffusionModule(LightningModule):
    """Trains one model with DiT's loss, at one of its patch sizes per step.

    Subclasses say what the model is, in :meth:`build_model`. Batches are ``{"x": (N, C, H, W), "y": (N,)}``.

    Args:
        target: the plain model to start from.
        flex: how it becomes flexible; null trains the plain model.
        optimizer: AdamW and its learning rate.
        patch_size_weights: how often each patch size is drawn, relative to the others; null draws all that train
            equally often.
        gradient_checkpointing: recompute each block in backward instead of keeping its activations.
        compile: compile each block, one graph per patch size.
        vae: local path or hub id of the VAE that decodes samples for pictures and metrics; null: pixels are modelled.
        seed: of fresh weights, patch sizes, timesteps, noise and label dropout.
    """

    def __init__(
        self,
        target: TargetSettings,
        flex: FlexSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        patch_size_weights: dict[str, float] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        vae: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.target_settings, self.flex_settings = target, flex
        self.optimizer_settings = optimizer or OptimizerSettings()
        self.patch_size_weights = patch_size_weights
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile
        self.vae, self.seed = vae, seed
        self.diffusion = GaussianDiffusion()
        self.model: DiT
        self.step_flops = 0
        self._codec: list[Any] = []  # in a list: never a submodule of what is trained
        self._since_logged: dict[str, list[Tensor]] = {}
        self._num_validated = 0
        self._gap: dict[PatchSize, Tensor] = {}

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            self.model = self.build_model()
        self.model.gradient_checkpointing = self.gradient_checkpointing
        self._weights = self._checked_weights()
        if self.compile_blocks:
            for block in self.model.blocks:
                block.compile(dynamic=False)  # with None, the second patch size would get a slower symbolic graph
        if self._trainer is not None:
            self._distribute()

    def build_model(self) -> DiT:
        """The model to train, before it is moved to a device."""
        raise NotImplementedError(f"{type(self).__name__} does not say which model it trains")

    @property
    def codec(self) -> Any:
        """Decodes latents for pictures and metrics; the identity where pixels are modelled."""
        if not self._codec:
            from flexidit.latents import LatentCodec, PixelCodec

            pixels = PixelCodec(self.model.in_channels)
            self._codec.append(pixels if self.vae is None else LatentCodec(self.vae, device=self.device))
        return self._codec[0]

    def patch_size_at(self, step: int) -> PatchSize:
        """The patch size of an optimizer step; all micro-batches of the step share it."""
        return draw_patch_size(self.model.patch_sizes, self._weights, self.seed, step)

    def on_fit_start(self) -> None:
        self._check_data(getattr(self.trainer, "datamodule", None))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        patch_size = self.patch_size_at(self.global_step)
        loss = self.diffusion_loss(batch, patch_size, self.train_draws(batch, batch_idx))
        # Backward costs twice the forward; with frozen weights the half of it that is their gradient falls away.
        self.step_flops = (2 if self._is_frozen else 3) * self._forward_flops(patch_size)
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
        is_last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if not (self._since_logged and is_last and self.global_step % interval == 0):
            return
        means = {name: torch.stack(values).mean().item() for name, values in self._since_logged.items()}
        self._since_logged = {}
        for logger in self.loggers:
            logger.log_metrics(means, step=self.global_step - 1)

    def train_draws(self, batch: Mapping[str, Tensor], batch_idx: int) -> SampleDraws:
        """The draws of a micro-batch of the present step."""
        count = len(batch["y"])
        first = batch_idx % self.trainer.accumulate_grad_batches * count
        return self._draws("train", self.global_step, first, count)

    def diffusion_loss(self, batch: Mapping[str, Tensor], patch_size: PatchSize, draws: SampleDraws) -> Tensor:
        """DiT's loss of a batch at drawn timesteps: scalar."""
        x_start, y = batch["x"], batch["y"]
        t = draws.timesteps(self.diffusion.num_timesteps, x_start.device)
        noise = draws.noise_like(x_start)
        dropout = self.model.config.class_dropout_prob if self.training else 0.0
        if dropout > 0:
            y = choose(draws.dropped(dropout, y.device), self.model.null_condition(y), y)
        x_t = self.diffusion.q_sample(x_start, t, noise)
        output = self.model(x_t, t, y, patch_size=patch_size)
        return diffusion_loss(self.diffusion, output, x_start, x_t, t, noise, self.model.learn_sigma).total.mean()

    def on_validation_epoch_start(self) -> None:
        self._num_validated = 0

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        draws = self._draws("validation", 0, self._num_validated, len(batch["y"]))
        self._num_validated += len(batch["y"])
        for patch_size in self.model.patch_sizes:  # every size is judged on the same draws
            loss = self.diffusion_loss(batch, patch_size, draws)
            self.log(f"val/loss_{patch_size.name}", loss, sync_dist=True, batch_size=len(batch["y"]))
        if batch_idx == 0 and len(self.model.patch_sizes) > 1 and not self.trainer.sanity_checking:
            self._gap = self._measure_gap(batch, draws)

    def on_validation_epoch_end(self) -> None:
        for size, gap in self._gap.items():
            for t, value in zip(GAP_TIMESTEPS, gap.unbind(), strict=True):
                self.log(f"val/gap_{size.name}@t{t:03d}", value, sync_dist=True)
        if self._gap and self.trainer.is_global_zero:
            self._draw_gap()
        self._gap = {}

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        settings = self.optimizer_settings
        # Without decay nobody needs to know how long the run is, and it may be endless.
        max_steps = self.trainer.estimated_stepping_batches if settings.decay == "cosine" else 0
        # A loss scaler (16-mixed) and clipping do not get along with the fused kernel, which unscales by itself.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer, schedule = settings.build(parameters, max_steps, fused=not scaled)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip with a fused optimizer under bf16-mixed (Lightning #21435); torch does not mind.
        if not gradient_clip_val:
            return
        parameters = [p for p in self.parameters() if p.grad is not None]
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, float(gradient_clip_val))
            return
        norm = nn.utils.clip_grad_norm_(parameters, float(gradient_clip_val))
        self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values only: LightningCLI reads checkpoints with weights_only=True.
        checkpoint["flexidit"] = {"config": config_to_dict(self.model.config)}

    @property
    def _is_frozen(self) -> bool:
        """Whether only what a weak size adds is trained."""
        flex = self.model.config.flex
        return flex is not None and flex.recipe == "lora"

    def _distribute(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            from lightning_modules.sharding import shard

            assert self.device_mesh is not None
            shard(self.model, self.device_mesh)
        elif isinstance(strategy, DDPStrategy):
            # What belongs to other patch sizes gets no gradient in a step, and AdamW must skip it as it does in one
            # process: a gradient of zero would let its momentum move it.
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def _checked_weights(self) -> list[float]:
        """One weight per patch size of the model, base first."""
        sizes = self.model.patch_sizes
        trained = [size for size in sizes if not (self._is_frozen and size == self.model.base_patch_size)]
        if self.patch_size_weights is None:
            return [float(size in trained) for size in sizes]
        given = {PatchSize.parse(size): weight for size, weight in self.patch_size_weights.items()}
        used = {size for size, weight in given.items() if weight > 0}
        if not used or used - set(trained) or set(given) - set(sizes) or min(given.values()) < 0:
            raise ValueError(
                f"patch_size_weights are {self.patch_size_weights}; give numbers that are 0 or more, and not all 0, to "
                f"the patch sizes that train: {', '.join(size.name for size in trained)}"
            )
        return [given.get(size, 0.0) for size in sizes]

    def _check_data(self, datamodule: Any) -> None:
        """Refuse data of another shape or with more classes before the first step does it in a worse way."""
        model = self.model
        shape, num_classes = getattr(datamodule, "sample_shape", None), getattr(datamodule, "num_classes", None)
        expected = (model.in_channels, *model.input_size)
        if shape is not None and tuple(shape) != expected:
            raise ValueError(
                f"the data have samples of shape {tuple(shape)}, the model takes {expected}: set in_channels and "
                "input_size in target.overrides, or use other data"
            )
        if num_classes is not None and num_classes > model.num_classes:
            raise ValueError(
                f"the data have {num_classes} classes, the model {model.num_classes}: set num_classes in "
                "target.overrides, or use other data"
            )

    def _draws(self, stream: str, step: int, first: int, count: int) -> SampleDraws:
        world_size = self.trainer.world_size
        return SampleDraws(self.seed, stream, step, places(first, count, self.global_rank, world_size))

    def _measure_gap(self, batch: Mapping[str, Tensor], draws: SampleDraws) -> dict[PatchSize, Tensor]:
        from flexidit.analysis.gap import weak_powerful_gap

        noise = draws.noise_like(batch["x"])
        return weak_powerful_gap(self.model, self.diffusion, batch["x"], batch["y"], noise, GAP_TIMESTEPS)

    def _draw_gap(self) -> None:
        from flexidit.plots import gap_figure

        for board in self._tensorboards():
            board.add_figure("val/gap", gap_figure(GAP_TIMESTEPS, self._gap), self.global_step)

    def _tensorboards(self) -> Iterator[Any]:
        writers = (getattr(logger, "experiment", None) for logger in self.loggers)
        return (writer for writer in writers if hasattr(writer, "add_figure"))

    def _forward_flops(self, patch_size: PatchSize) -> int:
        from flexidit.flops import forward_flops

        return forward_flops(self.model, patch_size, merged=False)
