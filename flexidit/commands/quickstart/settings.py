"""What the quick start does, in numbers: written to ``config.yaml`` in its folder, so that it can be repeated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class QuickstartSettings:
    """A small transformer on 8x8 digits, in pixels; sizes that two CPU cores manage in minutes."""

    recipe = ""
    """Name on the command line."""
    has_captions = False
    """Whether samples are asked for, and judged, by captions."""

    seed: int = 0
    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    patch_size: int | str = 2
    weak_patch_size: int | str = 4
    batch_size: int = 64
    ema_decay: float = 0.995

    pretraining_steps: int = 1400
    pretraining_lr: float = 3e-3

    num_sampling_steps: int = 50
    cfg_scale: float = 1.5
    num_samples: int = 200
    """Per schedule and seed."""
    sampling_batch_size: int = 50
    """Small enough for its activations to stay in the processor's cache: faster than all at once."""
    num_seeds: int = 3
    weak_steps: tuple[int, ...] = (0, 10, 20, 30, 40, 50)
    """Weak steps of the weak-first schedules; the last one is all-weak."""
    compared_weak_steps: tuple[int, ...] = (10, 40)
    """Of these, weak-last and fewer steps are measured at equal cost."""

    def variant_overrides(self) -> dict[str, Any]:
        """Fields of the model's config."""
        return {
            "input_size": 8,
            "in_channels": 1,
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "depth": self.depth,
            "num_heads": self.num_heads,
        }

    def to_yaml(self) -> str:
        """All fields."""
        fields = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return yaml.safe_dump({"recipe": self.recipe, **fields})


@dataclass(frozen=True)
class ClassConditionalSettings(QuickstartSettings):
    """Full fine-tuning with the distribution-matching loss (paper, section 3.1 and appendix B.1)."""

    recipe = "class-conditional"

    fine_tuning_steps: int = 900
    fine_tuning_lr: float = 1e-3
    mmd_weight: float = 0.1
    mmd_start_step: int = 450
    mmd_every_n_steps: int = 4

    def variant_overrides(self) -> dict[str, Any]:
        """Fields of the model's config."""
        return {**super().variant_overrides(), "num_classes": 10}


@dataclass(frozen=True)
class TextToImageSettings(QuickstartSettings):
    """Captioned digits, and an adapter that is distilled from the model itself (paper, section 3.2)."""

    recipe = "text-to-image"
    has_captions = True

    pretraining_steps: int = 2000
    """Captions take longer to learn than classes."""
    distillation_steps: int = 1000
    distillation_lr: float = 6e-3
    rank: int = 16


@dataclass(frozen=True)
class TextToVideoSettings(QuickstartSettings):
    """Moving digits with captions: an image model, inflated to clips, with a temporal and a spatial weak mode.

    Patches of 4x4 pixels here are what patches of 2x2 latents are elsewhere: a ninth of a frame. Larger ones cover half
    of a side, or two frames.
    """

    recipe = "text-to-video"
    has_captions = True

    canvas_size: int = 12
    num_frames: int = 8
    patch_size: int | str = "1x4x4"
    temporal_patch_size: str = "2x4x4"
    weak_patch_size: int | str = "1x6x6"
    """The spatial weak mode."""

    image_steps: int = 800
    """Of single frames, which are an eighth of the tokens, before the model sees clips."""
    image_batch_size: int = 64
    image_lr: float = 3e-3
    batch_size: int = 32
    pretraining_steps: int = 1500
    pretraining_lr: float = 2e-3
    distillation_steps: int = 800
    distillation_lr: float = 4e-3
    rank: int = 16

    num_sampling_steps: int = 16
    cfg_scale: float = 2.0
    num_samples: int = 200
    sampling_batch_size: int = 25
    num_seeds: int = 2
    weak_steps: tuple[int, ...] = (0, 4, 8, 12, 16)
    """Of each weak mode."""
    mixtures: tuple[str, ...] = ("1x6x6:4,2x4x4:4,1x4x4:8", "1x6x6:8,2x4x4:4,1x4x4:4")
    """Schedules with both weak modes."""
    compared_weak_steps: tuple[int, ...] = (12,)
    """Spatially weak steps of what is compared with weak-last and with fewer steps."""

    def variant_overrides(self) -> dict[str, Any]:
        """Fields of the model's config."""
        return {
            **super().variant_overrides(),
            "input_size": [self.num_frames, self.canvas_size, self.canvas_size],
            "position_table": "learned",
            "process": "flow",
        }

    def image_overrides(self) -> dict[str, Any]:
        """The same for single frames."""
        return {**self.variant_overrides(), "input_size": [self.canvas_size, self.canvas_size]}


SETTINGS: dict[str, type[QuickstartSettings]] = {
    kind.recipe: kind for kind in (ClassConditionalSettings, TextToImageSettings, TextToVideoSettings)
}


def claim_folder(out: Path, settings: QuickstartSettings) -> None:
    """Make the folder this run's own, or continue a run of the same settings in it.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    file = out / "config.yaml"
    out.mkdir(parents=True, exist_ok=True)
    text = settings.to_yaml()
    if not file.is_file():
        file.write_text(text)
        return
    if (found := file.read_text()) != text:
        old, new = yaml.safe_load(found), yaml.safe_load(text)
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        differences = ", ".join(f"{name} {old.get(name)} there, {new.get(name)} now" for name in sorted(names))
        raise ValueError(f"{out} holds a run with other settings ({differences}); give another --out or remove it")
