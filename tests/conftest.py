"""Fixtures and switches for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take more than half a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes more than half a minute; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with setup.cfg."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real images, latents and weights that are not part of the project."""
    for folder in (os.environ.get("FLEXIDIT_TEST_DATA"), REPOSITORY.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("needs real data: set FLEXIDIT_TEST_DATA to a folder that has it")


@pytest.fixture(scope="session")
def randomised() -> Callable[..., nn.Module]:
    """Fill every trainable tensor of a model: fresh DiTs output zero, which would hide most differences."""

    def fill(model: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=std, generator=generator)
        return model

    return fill
