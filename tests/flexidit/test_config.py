"""Which process a config stands for, there and back, and which mistakes it names."""

from __future__ import annotations

from typing import Any

import pytest

from flexidit.config import DiTConfig, TextDiTConfig, config_from_dict, config_to_dict
from flexidit.patch_size import PatchSize


@pytest.mark.parametrize("kind", [DiTConfig, TextDiTConfig])
def test_the_process_travels(kind: type[DiTConfig] | type[TextDiTConfig]) -> None:
    config = kind(process="flow", time_shift=5.0, learn_sigma=False)
    assert config_from_dict(config_to_dict(config)) == config
    assert config.plain(PatchSize.parse(4)).process == "flow"
    assert config.out_channels == config.in_channels


@pytest.mark.parametrize("kind", [DiTConfig, TextDiTConfig])
def test_what_an_earlier_version_wrote_is_a_diffusion(kind: type[DiTConfig] | type[TextDiTConfig]) -> None:
    old = config_to_dict(kind())
    del old["process"], old["time_shift"]
    assert config_from_dict(old) == kind() and kind().process == "diffusion"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"process": "flow"}, "set learn_sigma=False with process='flow'"),
        ({"process": "flows", "learn_sigma": False}, "process is 'diffusion' or 'flow', got 'flows'"),
        ({"time_shift": 3.0}, "time_shift=3.0 belongs to process='flow'; leave it at 1 for diffusion"),
        *(
            ({"process": "flow", "learn_sigma": False, "time_shift": shift}, "time_shift is a number above 0")
            for shift in (0, -1.0, float("nan"), float("inf"), "3")
        ),
    ],
)
def test_impossible_processes_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TextDiTConfig(**fields)
