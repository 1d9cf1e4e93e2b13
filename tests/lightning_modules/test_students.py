"""A target becomes flexible once; what is flexible already must be what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexidit.checkpoint import save_checkpoint
from lightning_modules.settings import FlexSettings, TargetSettings
from lightning_modules.students import make_student

MakeTarget = Callable[..., TargetSettings]


@pytest.mark.parametrize("recipe", ["shared", "lora"])
@pytest.mark.parametrize("variant", ["DiT-Tiny/2", "TextDiT-Tiny/2"])
def test_the_settings_are_followed(make_target: MakeTarget, capsys: Any, variant: str, recipe: Any) -> None:
    student = make_student(
        make_target(variant).build(), FlexSettings([8, 4], recipe=recipe, rank=2, positions="corners")
    )
    assert [size.name for size in student.patch_sizes] == ["1x2x2", "1x4x4", "1x8x8"]
    assert student.config.flex.recipe == recipe
    assert student.config.flex.positions == "corners"
    assert "new parameters" in capsys.readouterr().out


def test_a_flexible_checkpoint_is_taken_as_it_is_or_refused(make_target: MakeTarget, tmp_path: Path) -> None:
    flex = FlexSettings([4], recipe="lora", rank=2)
    student = make_student(make_target().build(), flex)
    given = TargetSettings(checkpoint=str(save_checkpoint(student, tmp_path / "student.safetensors")))
    again = make_student(given.build(), flex)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in student.named_parameters() if p.requires_grad
    }
    with pytest.raises(ValueError, match=r"recipe 'lora', patch sizes 1x4x4\), .* recipe 'shared' and 1x4x4, 1x8x8"):
        make_student(given.build(), FlexSettings([8, 4]))
    for changed, message in (
        ({"rank": 32}, "with rank 2, and the config asks for rank 32"),
        ({"alpha": 4.0}, "with alpha 2.0, and the config asks for alpha 4.0"),
        ({"positions": "corners"}, "with positions coords, and the config asks for positions corners"),
    ):
        with pytest.raises(ValueError, match=message):
            make_student(given.build(), replace(flex, **changed))
