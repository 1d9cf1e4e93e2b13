"""What a story of the quick start consists of, whichever recipe it tells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from flexidit.commands.quickstart.settings import QuickstartSettings

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch import LightningDataModule

    from flexidit.commands.quickstart.evaluation import Judge
    from flexidit.metrics.prompts import Conditions
    from flexidit.models import FlexiTransformer
    from lightning_modules.base import DiffusionModule

Settings = TypeVar("Settings", bound=QuickstartSettings)


class Recipe(ABC, Generic[Settings]):
    """Two trainings, what samples are asked for, and the sentences that explain it."""

    tuning_stage: str
    """Name of the second training."""
    plot_title: str

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def data(self) -> LightningDataModule:
        """What both trainings read."""

    @abstractmethod
    def pretraining(self) -> DiffusionModule:
        """Trains the target from random weights."""

    @abstractmethod
    def tuning(self, target: Path) -> DiffusionModule:
        """Makes it flexible."""

    @property
    @abstractmethod
    def num_tuning_steps(self) -> int:
        """Of the second training."""

    def sampled(self, student: FlexiTransformer) -> Any:
        """The model that draws samples, and is priced."""
        return student

    @abstractmethod
    def conditions(self, seed: int) -> Conditions:
        """What the samples of a seed are asked for."""

    @abstractmethod
    def judges(self, judge: Judge) -> Sequence[Any]:
        """What they are judged by beside the Frechet distance."""

    @abstractmethod
    def pictured(self) -> tuple[Any, Tensor, list[str]]:
        """For the grid of samples: ten conditions, real digits (10, 1, 8, 8) that meet them, and column titles."""

    @abstractmethod
    def promise(self, target: FlexiTransformer, student: FlexiTransformer) -> str:
        """One sentence, checked here and now, on what becoming flexible did to the target."""

    @abstractmethod
    def steps(self) -> list[str]:
        """What was trained, for the report."""

    @abstractmethod
    def limits(self) -> list[str]:
        """What this does not show, for the report."""

    @abstractmethod
    def example(self, out: Path) -> str:
        """A command that draws more samples."""
