from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from flexidit import PatchSchedule, Sampler, create_model, flexify
from flexidit.merged import MergedModel
from flexidit.models.dit import DiT

Y = torch.tensor([1, 9])


@pytest.fixture
def student(randomised: Callable[..., nn.Module]) -> DiT:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    randomised(model)
    student = flexify(model, [4, 8], recipe="lora", rank=4)
    randomised(student, seed=1)
    return student.eval()


def test_every_size_computes_what_the_student_does(student: DiT) -> None:
    merged, x, t = MergedModel(student), torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    assert merged.patch_sizes == student.patch_sizes
    assert torch.equal(merged(x, t, Y, patch_size=2), student(x, t, Y, patch_size=2))
    for patch_size in (4, 8):
        expected = student(x, t, Y, patch_size=patch_size)
        torch.testing.assert_close(merged(x, t, Y, patch_size=patch_size), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["coords", "corners", "grid"])
def test_patches_stay_where_they_are_at_another_latent_size(
    randomised: Callable[..., nn.Module], positions: str
) -> None:
    model = create_model("DiT-Tiny/2", input_size=8, num_classes=10)
    randomised(model)
    student = flexify(model, [4], recipe="lora", rank=4, positions=positions).eval()  # type: ignore[arg-type]
    x, t = torch.randn(2, 4, 12, 16), torch.tensor([3, 500])
    expected = student(x, t, Y, patch_size=4)
    torch.testing.assert_close(MergedModel(student)(x, t, Y, patch_size=4), expected, atol=1e-5, rtol=1e-5)


def test_a_sampler_takes_it_for_the_student(student: DiT) -> None:
    schedule = PatchSchedule.parse("8:1,4:1,2:1")
    ours, theirs = (
        Sampler(model, "ddim", schedule=schedule, cfg_scale=2.0)(Y, generator=torch.Generator().manual_seed(0))
        for model in (MergedModel(student), student)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_models_without_adapters_are_refused(student: DiT) -> None:
    plain = create_model("DiT-Tiny/2", input_size=8)
    for model in (plain, flexify(plain, [4])):
        with pytest.raises(ValueError, match="no adapters to merge"):
            MergedModel(model)
    with pytest.raises(ValueError, match="no patch size 1x3x3"):
        MergedModel(student)(torch.zeros(2, 4, 8, 8), Y, Y, patch_size=3)
