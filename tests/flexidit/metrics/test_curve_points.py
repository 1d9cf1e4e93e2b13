"""A point survives its csv exactly, and says how it came about."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from flexidit.metrics.curve_points import CurvePoint, find_point, read_csv, write_csv

POINT = CurvePoint(
    series="weak first",
    budget=0.6,
    relative_flops=0.1 + 0.2,
    flops_per_image=237_240_000_000,
    frechet=1 / 3,
    accuracy=None,
    seconds_per_image=0.01,
    schedule="1x4x4:4,1x2x2:6",
    num_sampling_steps=10,
    num_samples=500,
    evaluator="ResNet-56",
    fingerprint="resnet56/abc",
    reference="digits, train (1437 samples)",
    model="step 10",
    codec="PixelCodec",
    solver="ddpm",
    cfg_scale=1.5,
    guidance_channels=None,
    precision="float32",
    seed=3,
    batch_size=64,
    device="cpu",
)


def test_csv_is_exact(tmp_path: Path) -> None:
    points = [POINT, replace(POINT, accuracy=0.98, guidance_channels=3, reference='caf\xe9, "quoted"')]
    write_csv(points[:1], tmp_path / "new" / "curve.csv")
    assert read_csv(tmp_path / "new" / "curve.csv") == points[:1]
    write_csv(points, tmp_path / "curve.csv")
    again = read_csv(tmp_path / "curve.csv")
    assert [point.accuracy for point in again] == [None, 0.98]
    assert again[1].guidance_channels == 3
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["curve.csv"]


def test_what_was_asked_for_is_kept(tmp_path: Path) -> None:
    point = replace(POINT, agreement=0.875, clip_score=25.5, conditions="caf\xe9.txt (2 prompts, 0a)", judges="a; b")
    write_csv([point, POINT], tmp_path / "curve.csv")
    assert read_csv(tmp_path / "curve.csv") == [point, POINT]
    for part in ("caption agreement 87.5%", "CLIP score 25.50", "caf\xe9.txt (2 prompts, 0a)", "a; b"):
        assert part in point.describe() and part not in POINT.describe()


def test_files_from_before_there_were_prompts_are_read(tmp_path: Path) -> None:
    new = {"agreement", "clip_score", "conditions", "judges", "frechet_frames", "flicker", "smoothness"}
    row = {name: "" if value is None else str(value) for name, value in asdict(POINT).items() if name not in new}
    quoted = ['"' + value.replace('"', '""') + '"' for value in row.values()]
    (tmp_path / "old.csv").write_text(",".join(row) + "\n" + ",".join(quoted) + "\n")
    assert read_csv(tmp_path / "old.csv") == [POINT]


def test_what_is_measured_of_clips_is_kept(tmp_path: Path) -> None:
    point = replace(POINT, frechet_frames=1 / 7, flicker=0.9375, smoothness=1 / 3)
    write_csv([point, POINT], tmp_path / "curve.csv")
    assert read_csv(tmp_path / "curve.csv") == [point, POINT]
    for part in ("Frechet distance 0.3333, per frame 0.1429", "flicker 0.9375", "smoothness 0.3333"):
        assert part in point.describe() and part not in POINT.describe()


def test_files_from_before_there_were_clips_are_read(tmp_path: Path) -> None:
    point = replace(POINT, agreement=0.5, conditions="captions")
    write_csv([point], tmp_path / "new.csv")
    lines = [line.split(",") for line in (tmp_path / "new.csv").read_text().splitlines()]
    assert lines[0][-3:] == ["frechet_frames", "flicker", "smoothness"]
    (tmp_path / "old.csv").write_text("".join(",".join(cells[:-3]) + "\n" for cells in lines))
    assert read_csv(tmp_path / "old.csv") == [point]


def test_no_file_is_no_points_and_another_file_is_refused(tmp_path: Path) -> None:
    assert read_csv(tmp_path / "missing.csv") == []
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="its columns differ"):
        read_csv(tmp_path / "other.csv")


def test_the_line_names_everything_that_moves_a_number() -> None:
    line = replace(POINT, guidance_channels=3).describe()
    for part in ("0.3333", "30.0%", "ResNet-56", "digits, train", "500 samples", "ddpm, 10 steps", "1x4x4:4,1x2x2:6",
                 "guidance 1.5 on 3 channels", "PixelCodec", "float32", "seed 3"):  # fmt: skip
        assert part in line


def test_found_by_all_given_values() -> None:
    other = replace(POINT, seed=4)
    record = {name: value for name, value in asdict(other).items() if name not in ("frechet", "seconds_per_image")}
    assert find_point([POINT, other], record) == other
    assert find_point([POINT], record) is None
