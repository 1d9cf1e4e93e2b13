"""What a story of the quick start consists of, whichever recipe it tells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flexidit.commands.quickstart.settings import QuickstartSettings

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch import LightningDataModule

    from flexidit.commands.quickstart.judge import Judge
    from flexidit.metrics.curve_candidates import Candidate
    from flexidit.metrics.prompts import Conditions
    from flexidit.models import FlexiTransformer
    from lightning_modules.base import DiffusionModule

Settings = TypeVar("Settings", bound=QuickstartSettings)


@dataclass(frozen=True)
class Stage:
    """One training."""

    name: str
    """For people, and of its folder of checkpoints."""
    result: str
    """Name of the file with its averaged weights, without suffix; the last two are "target" and "student"."""
    make: Callable[[Path | None], DiffusionModule]
    """The module, given the weights of the stage before."""
    data: Callable[[], LightningDataModule]
    num_steps: int


class Recipe(ABC, Generic[Settings]):
    """Some trainings, what samples are asked for, and the sentences that explain it."""

    plot_title: str

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def stages(self) -> Sequence[Stage]:
        """The trainings, in order."""

    @abstractmethod
    def judge(self) -> Judge:
        """Who judges; trained here and now."""

    @abstractmethod
    def schedules(self, model: Any) -> Sequence[Candidate]:
        """What is measured."""

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
    def draw_samples(self, model: Any, out: Path) -> list[str]:
        """Pictures of samples from the same noise at several budgets; names of the files, the first is for the page."""

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
