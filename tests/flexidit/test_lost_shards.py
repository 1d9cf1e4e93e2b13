"""A shard that goes while it is in use is named, and its samples are replaced; a folder that lies is not believed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexidit.draws import Draw
from flexidit.images import find_images
from flexidit.latent_encoding import EncodeSettings, encode_images
from flexidit.latent_metadata import Metadata
from flexidit.latent_shards import LatentShards
from flexidit.latents import LatentCodec
from flexidit.lost_shards import LostShards
from flexidit.sample_readers import ImageReader


@pytest.fixture
def latents(image_folder: Path, kl_vae: Path, tmp_path: Path) -> Path:
    """Twelve encoded images in three shards of five, five and two."""
    settings = EncodeSettings(ImageReader(16), shard_size=5, dtype="float32")
    encode_images(find_images(image_folder), LatentCodec(kl_vae), tmp_path / "latents", settings)
    return tmp_path / "latents"


DRAWS = [Draw(sample, 3) for sample in range(12)]


def lose(dataset: LatentShards, name: str, how: str) -> None:
    path = dataset.root / name
    path.unlink() if how == "deleted" else path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("how", ["deleted", "cut"])
@pytest.mark.parametrize("seen", ["looked for", "opened"])
def test_a_lost_shard_is_named_and_replaced_and_changes_nothing_else(
    latents: Path, how: str, seen: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = LatentShards(latents, seed=3)
    before = whole.__getitems__(DRAWS)
    lose(whole, "shard-00001.safetensors", how)
    if seen == "looked for":
        whole.check_files()
    else:
        whole._handles = {}  # as a process that starts now
    after = whole.__getitems__(DRAWS)
    kept = [*range(5), 10, 11]
    assert torch.equal(after["x"][kept], before["x"][kept])
    assert [after["names"][row] for row in kept] == [before["names"][row] for row in kept]
    assert after["x"].shape == before["x"].shape
    assert not any("shard-00001" in name for name in after["names"])
    [skip] = whole.report
    assert (skip.name, skip.reason) == ("shard-00001.safetensors", "lost during the run, 5 samples")
    assert caplog.text.count("shard-00001.safetensors of ") == caplog.text.count("was lost") == 1
    # What replaces a sample is that sample: image, flip, noise and label.
    places = [before["names"].index(name) for name in after["names"]]
    again = LatentShards(latents, seed=3)
    assert len(again) == 7
    assert after["y"].tolist() == before["y"][places].tolist()
    assert torch.equal(after["x"], before["x"][places])


def test_a_lost_shard_ends_the_run_by_choice(latents: Path) -> None:
    dataset = LatentShards(latents, on_error="raise")
    lose(dataset, "shard-00002.safetensors", "deleted")
    dataset.__getitems__(DRAWS)  # what is open can still be read
    with pytest.raises(ValueError, match=r"shard-00002.safetensors .* was lost during the run \(missing\): restore it"):
        dataset.check_files()


def test_nothing_left_is_an_error(latents: Path) -> None:
    dataset = LatentShards(latents)
    for path in latents.glob("*.safetensors"):
        path.unlink()
    dataset.check_files()
    with pytest.raises(ValueError, match="no shard of latents can be read any more"):
        dataset.__getitems__(DRAWS)


def test_replacements_are_spread_over_all_that_is_left() -> None:
    lost = LostShards([100, 100, 50, 50])
    lost.add(1)
    lost.add(2)
    found = Counter(lost.replacement(0, Draw(sample, epoch)) for sample in range(100, 250) for epoch in range(20))
    assert set(found) == {*range(100), *range(250, 300)}
    assert max(found.values()) < 50  # 3,000 draws over 150: 20 each
    assert lost.replacement(0, Draw(101, 1)) == lost.replacement(0, Draw(101, 1))
    assert list(lost) == [1, 2]


def rewrite(latents: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = latents / "metadata.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", 7, None])
def test_shards_outside_of_the_folder_are_refused(latents: Path, name: Any) -> None:
    rewrite(latents, lambda content: content["shards"]["1"].update(file=name))
    with pytest.raises(ValueError, match="not readable as latent metadata"):
        LatentShards(latents)


@pytest.mark.parametrize("change", [{"count": -1}, {"count": "many"}, {"bytes": None}, {"count": 1 << 70}])
def test_absurd_counts_are_refused(latents: Path, change: dict[str, Any]) -> None:
    rewrite(latents, lambda content: content["shards"]["1"].update(change))
    with pytest.raises(ValueError, match="not readable as latent metadata"):
        LatentShards(latents)


def test_metadata_that_is_nested_without_end_are_refused(latents: Path) -> None:
    (latents / "metadata.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="not readable as latent metadata"):
        Metadata.load(latents)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mean", lambda x: x[:-1], r"its mean has the shape \[4, 4, 4, 4\], the metadata say \[5, 4, 4, 4\]"),
        ("std", lambda x: x[:, :1].contiguous(), "its std has the shape"),
        ("index", lambda x: torch.cat([x, x]), "its index has the shape"),
        ("label", lambda x: -x - 1, "its labels are not one number from 0 on"),
        ("label", lambda x: x[:2], "its labels are not one number from 0 on"),
        ("mean_flip", lambda x: None, "unreadable: .*mean_flip"),
    ],
)
def test_a_shard_that_contradicts_the_metadata_is_named_and_left_out(
    latents: Path, name: str, change: Callable[..., Any], reason: str
) -> None:
    path = latents / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    rewrite(latents, lambda content: content["shards"]["1"].update(bytes=path.stat().st_size))
    dataset = LatentShards(latents)
    assert len(dataset) == 7
    [skip] = dataset.report
    assert skip.name == path.name
    assert re.search(reason, skip.reason)
