"""What the quick start does, in numbers: written to ``config.yaml`` in its folder, so that it can be repeated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class QuickstartSettings:
    """A small class-conditional transformer on 8x8 digits, in pixels; sizes that two CPU cores manage in minutes."""

    seed: int = 0
    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    patch_size: int = 2
    weak_patch_size: int = 4
    batch_size: int = 64
    ema_decay: float = 0.995

    pretraining_steps: int = 1400
    pretraining_lr: float = 3e-3

    fine_tuning_steps: int = 900
    fine_tuning_lr: float = 1e-3
    mmd_weight: float = 0.1
    mmd_start_step: int = 450
    mmd_every_n_steps: int = 4

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
            "num_classes": 10,
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "depth": self.depth,
            "num_heads": self.num_heads,
        }

    def to_yaml(self) -> str:
        """All fields."""
        return yaml.safe_dump({key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()})


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
