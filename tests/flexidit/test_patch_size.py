from __future__ import annotations

import pytest

from flexidit.patch_size import PatchSize


@pytest.mark.parametrize("value", [4, "4", "1x4x4", "4x4", (4, 4), (1, 4, 4), [1, 4, 4], PatchSize(1, 4, 4)])
def test_all_written_forms_mean_the_same(value: object) -> None:
    assert PatchSize.parse(value) == PatchSize(1, 4, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["", "x4", "4x", "four", 0, -2, True, (1, 2, 3, 4), (2.0, 2.0), None, "1x4x4x4"])
def test_other_forms_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="patch"):
        PatchSize.parse(value)  # type: ignore[arg-type]


def test_name_reads_back() -> None:
    for size in (PatchSize(1, 2, 2), PatchSize(2, 4, 8)):
        assert PatchSize.parse(size.name) == size


def test_order_is_by_what_a_patch_covers() -> None:
    sizes = [PatchSize.parse(s) for s in ("2x4x4", "1x4x4", "1x2x2", "2x2x2")]
    assert [s.name for s in sorted(sizes)] == ["1x2x2", "2x2x2", "1x4x4", "2x4x4"]
    assert PatchSize.parse(2) <= PatchSize.parse("1x2x2")


def test_tokens_of_the_papers_models() -> None:
    assert PatchSize.parse(2).num_tokens((32, 32)) == 256  # DiT-XL/2 at 256 px
    video = (32, 88, 48)  # appendix C.1
    assert [PatchSize.parse(s).num_tokens(video) for s in ("1x2x2", "2x2x2", "1x4x4")] == [33792, 16896, 8448]


def test_a_size_that_does_not_divide_is_padded() -> None:
    assert PatchSize.parse("2x4x4").grid((21, 45, 80)) == (11, 12, 20)
