"""What every training module shares: patch size and noise of a step, optimizer, validation, what a checkpoint says.

Everything random in a step is a pure function of (seed, step, rank): equal work on all ranks without communication,
and a resumed run continues with the draws it would have made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from flexidit.config import config_to_dict
from flexidit.diffusion.gaussian import GaussianDiffusion
from flexidit.diffusion.losses import diffusion_loss
from flexidit.models.dit import DiT
from flexidit.patch_size import PatchSize
from lightning_modules.settings import FlexSettings, OptimizerSettings, TargetSettings

Stream = Literal["patch_size", "train", "validation", "matching", "time_pair"]

GAP_TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
"""Where validation compares weak with powerful predictions (paper, Fig. 4 right)."""


def stream_seed(seed: int, step: int, rank: int, stream: Stream) -> int:
    """A 63-bit seed that depends on all four, and on nothing else.

    Example:
        >>> stream_seed(0, 7, 0, "train") == stream_seed(0, 7, 0, "train")
        True
        >>> stream_seed(0, 7, 0, "train") == stream_seed(0, 7, 1, "train")
        False
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_patch_size(sizes: Sequence[PatchSize], weights: Sequence[float], seed: int, step: int) -> PatchSize:
    """The patch size of an optimizer step: the same on every rank, and after a resume."""
    point = stream_seed(seed, step, 0, "patch_size") / 2**63 * sum(weights)
    for size, weight in zip(sizes, weights, strict=True):
        point -= weight
        if point < 0:
            return size
    return [size for size, weight in zip(sizes, weights, strict=True) if weight > 0][-1]


class DiffusionModule(LightningModule):
    """Trains one model with DiT's loss, at one of its patch sizes per step.

    Subclasses say what the model is, in :meth:`build_model`. Batches are ``{"x": (N, C, H, W), "y": (N,)}``.

    Args:
        target: the plain model to start from.
        flex: how it becomes flexible; null trains the plain model.
        optimizer: AdamW and its learning rate.
        patch_size_weights: how often each patch size is drawn, relative to the others; null draws all equally often.
        gradient_checkpointing: recompute each block in backward instead of keeping its activations.
        compile: compile each block, one graph per patch size.
        vae: local path or hub id of the VAE that decodes samples for pictures and metrics; null: pixels are modelled.
        seed: of patch sizes, timesteps, noise and label dropout.
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
        self._gap: dict[PatchSize, Tensor] = {}

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = self.build_model()
        self.model.gradient_checkpointing = self.gradient_checkpointing
        self._weights = self._checked_weights()
        if self.compile_blocks:
            for block in self.model.blocks:
                block.compile(dynamic=False)

    def build_model(self) -> DiT:
        """The model to train, before it is moved to a device."""
        raise NotImplementedError(f"{type(self).__name__} does not say which model it trains")

    @property
    def codec(self) -> Any:
        """Decodes latents for pictures and metrics; the identity where pixels are modelled."""
        if not self._codec:
            from flexidit.latents import LatentCodec, PixelCodec

            self._codec.append(PixelCodec() if self.vae is None else LatentCodec(self.vae, device=self.device))
        return self._codec[0]

    def patch_size_at(self, step: int) -> PatchSize:
        """The patch size of an optimizer step."""
        return draw_patch_size(self.model.patch_sizes, self._weights, self.seed, step)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        patch_size = self.patch_size_at(self.global_step)
        # Micro-batches of one optimizer step share its patch size, but not their noise.
        draws = self._generator("train", self.trainer.fit_loop.epoch_loop.total_batch_idx)
        loss = self.diffusion_loss(batch, patch_size, draws)
        self.step_flops = 3 * self._forward_flops(patch_size)
        self.log_dict({"train/loss": loss.detach(), f"train/loss_{patch_size.name}": loss.detach()})
        return loss

    def diffusion_loss(self, batch: Mapping[str, Tensor], patch_size: PatchSize, generator: torch.Generator) -> Tensor:
        """DiT's loss of a batch at drawn timesteps: scalar."""
        x_start, y = batch["x"], batch["y"]
        t, noise = self._draw_noise(x_start, generator)
        drop_ids = self._draw_dropout(y, generator)
        x_t = self.diffusion.q_sample(x_start, t, noise)
        output = self.model(x_t, t, y, patch_size=patch_size, drop_ids=drop_ids)
        return diffusion_loss(self.diffusion, output, x_start, x_t, t, noise, self.model.learn_sigma).total.mean()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        draws = self._generator("validation", batch_idx)
        start = draws.get_state()
        for patch_size in self.model.patch_sizes:
            draws.set_state(start)  # every size is judged on the same noise
            loss = self.diffusion_loss(batch, patch_size, draws)
            self.log(f"val/loss_{patch_size.name}", loss, sync_dist=True, batch_size=len(batch["y"]))
        if batch_idx == 0 and len(self.model.patch_sizes) > 1:
            self._gap = self._measure_gap(batch, draws)

    def on_validation_epoch_end(self) -> None:
        for size, gap in self._gap.items():
            values = dict(zip(GAP_TIMESTEPS, gap.unbind(), strict=True))
            for t, value in values.items():
                self.log(f"val/gap_{size.name}@t{t:03d}", value, sync_dist=True)
        if self._gap and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._draw_gap()
        self._gap = {}

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        max_steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = self.optimizer_settings.build(parameters, max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip with a fused optimizer under bf16-mixed (Lightning #21435); torch does not mind.
        if gradient_clip_val:
            parameters = [p for p in self.parameters() if p.grad is not None]
            norm = nn.utils.clip_grad_norm_(parameters, float(gradient_clip_val))
            self.log("train/grad_norm", norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values only: LightningCLI reads checkpoints with weights_only=True.
        checkpoint["flexidit"] = {"config": config_to_dict(self.model.config)}

    def _checked_weights(self) -> list[float]:
        sizes = self.model.patch_sizes
        if self.patch_size_weights is None:
            return [1.0] * len(sizes)
        given = {PatchSize.parse(size): weight for size, weight in self.patch_size_weights.items()}
        if set(given) - set(sizes) or min(given.values()) < 0 or sum(given.values()) <= 0:
            raise ValueError(
                f"patch_size_weights are {self.patch_size_weights}; give a weight >= 0, not all 0, to "
                f"{', '.join(size.name for size in sizes)}"
            )
        return [given.get(size, 0.0) for size in sizes]

    def _generator(self, stream: Stream, step: int, *, per_rank: bool = True) -> torch.Generator:
        rank = self.global_rank if per_rank else 0
        return torch.Generator(self.device).manual_seed(stream_seed(self.seed, step, rank, stream))

    def _draw_noise(self, x_start: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (N,) and noise like ``x_start``."""
        t = torch.randint(self.diffusion.num_timesteps, (len(x_start),), generator=generator, device=x_start.device)
        noise = torch.randn(x_start.shape, generator=generator, device=x_start.device, dtype=x_start.dtype)
        return t, noise

    def _draw_dropout(self, y: Tensor, generator: torch.Generator) -> Tensor | None:
        """(N,) bool; None where the model has no null label."""
        prob = self.model.config.class_dropout_prob if self.training else 0.0
        return torch.rand(y.shape, generator=generator, device=y.device) < prob if prob > 0 else None

    def _measure_gap(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[PatchSize, Tensor]:
        from flexidit.analysis.gap import weak_powerful_gap

        noise = torch.randn(batch["x"].shape, generator=generator, device=batch["x"].device)
        return weak_powerful_gap(self.model, self.diffusion, batch["x"], batch["y"], noise, GAP_TIMESTEPS)

    def _draw_gap(self) -> None:
        from flexidit.plots import gap_figure

        for board in self._tensorboards():
            board.add_figure("val/gap", gap_figure(GAP_TIMESTEPS, self._gap), self.global_step)

    def _tensorboards(self) -> Iterator[Any]:
        return (logger.experiment for logger in self.loggers if hasattr(logger.experiment, "add_figure"))

    def _forward_flops(self, patch_size: PatchSize) -> int:
        from flexidit.flops import forward_flops

        return forward_flops(self.model, patch_size)
