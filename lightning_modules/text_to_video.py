"""LoRA distillation of a text-to-video transformer: spatial and temporal weak modes (paper, sections 4.3 and C.2)."""

from __future__ import annotations

from flexidit.config import DiTConfig
from flexidit.models import FlexiTransformer
from lightning_modules.distillation import Distillation
from lightning_modules.settings import TABLE_5, FlexSettings, OptimizerSettings, TargetSettings
from lightning_modules.sharding import GatherDtype

VIDEO_ADAPTERS = FlexSettings(patch_sizes=["2x2x2", "1x4x4"], recipe="lora", rank=64)
"""The temporal and the spatial weak mode with the adapters of Table 5. As a default value, so that a config may change
one of its fields alone."""


class TextToVideo(Distillation):
    """Distils weak patch sizes of a text-to-video transformer; see :class:`Distillation` for the arguments.

    Larger patches in time, in space or in both ("2x4x4") are modes of one student, each with its own adapter,
    embedding, de-embedding and vector; a step trains one of them. Table 5: rank 64, AdamW at 8e-4 with weight decay
    1e-2 (all defaults), gradients clipped at 0.02, an average of decay 0.9999 (the trainer's and the callbacks').

    Example:
        flexidit fit -c configs/text_to_video/wan_1_3b.yaml
    """

    def __init__(
        self,
        target: TargetSettings,
        flex: FlexSettings = VIDEO_ADAPTERS,
        optimizer: OptimizerSettings = TABLE_5,
        distill_variance: bool = False,
        timestep_ranges: dict[str, tuple[int, int]] | str | None = None,
        patch_size_weights: dict[str, float] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        gather_dtype: GatherDtype = "float32",
        vae: str | None = None,
        seed: int = 0,
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            target=target,
            flex=flex,
            optimizer=optimizer,
            distill_variance=distill_variance,
            timestep_ranges=timestep_ranges,
            patch_size_weights=patch_size_weights,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            gather_dtype=gather_dtype,
            vae=vae,
            seed=seed,
            init_from=init_from,
        )

    def build_model(self, target: FlexiTransformer) -> FlexiTransformer:
        if isinstance(target.config, DiTConfig) or not target.config.is_video:
            kind = type(target).__name__
            takes = "clips by label" if target.config.is_video else f"images of {target.config.input_size}"
            raise ValueError(
                f"the target is a {kind} that takes {takes}: give a Wan, a VideoDiT, or a "
                "TextDiT with an input_size of (F, H, W)"
            )
        return super().build_model(target)
