import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from datamodules.loading import stream_loader
from datamodules.tar_samples import TarSamples, count_samples, expand_tars


def jpeg(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (level, level, level)).save(buffer, "jpeg")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path) -> list[str]:
    """Four tars of six samples; the label is the sample's number, and its grey level is ten times that."""
    for tar in range(4):
        members = {}
        for number in range(6 * tar, 6 * tar + 6):
            members |= {f"{number:03d}.jpg": jpeg(10 * number), f"{number:03d}.cls": str(number).encode()}
        write_tar(tmp_path / f"train-{tar:04d}.tar", members)
    return expand_tars(tmp_path)


def make(tars, num_workers=0, training=True, batch_size=4, **options):
    dataset = TarSamples(
        tars, 16, num_samples=24, batch_size=batch_size, training=training, shuffle_buffer=8, **options
    )
    return stream_loader(dataset, batch_size, num_workers)


def labels(loader) -> list:
    return [batch["y"].tolist() for batch in loader]


def flat(batches) -> list:
    return [label for batch in batches for label in batch]


def test_patterns_and_folders_expand(tars, tmp_path):
    assert expand_tars(tmp_path / "train-{0000..0003}.tar") == tars
    with pytest.raises(FileNotFoundError, match="train-0004"):
        expand_tars(tmp_path / "train-{0000..0004}.tar")
    assert count_samples(tars) == 24
    with pytest.raises(ValueError, match="set num_train_samples"):
        count_samples(["https://host/a.tar"])


def test_evaluation_reads_everything_once_in_order(tars):
    batches = list(make(tars, training=False))
    assert [label for batch in batches for label in batch["y"].tolist()] == list(range(24))
    assert all((batch["x"].mean((1, 2, 3)) * 127.5 + 127.5 - 10 * batch["y"]).abs().max() < 2 for batch in batches)


def test_training_is_shuffled_by_seed_and_epoch(tars):
    loader = make(tars)
    first, second = labels(loader), labels(loader)
    assert len(first) == len(loader) == 6
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(24))
    assert first != second
    assert labels(make(tars)) == first != labels(make(tars, seed=1))


def test_an_epoch_that_is_left_early_still_advances(tars):
    loader = make(tars)
    whole = [labels(loader) for loader in [make(tars)] for _ in range(2)]
    batches = iter(loader)
    assert [next(batches)["y"].tolist() for _ in range(6)] == whole[0]  # all, without asking for more
    assert labels(loader) == whole[1]


def test_a_pass_continues_where_the_last_one_stopped(tars):
    loader = make(tars)
    first = next(iter(loader))["y"].tolist()
    assert [first, *labels(loader)] == labels(make(tars))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_is_exact(tars, num_workers):
    whole = [labels(loader) for loader in [make(tars, num_workers)] for _ in range(2)]
    loader = make(tars, num_workers)
    labels(loader)
    batches = iter(loader)
    begun = [next(batches)["y"].tolist() for _ in range(3)]
    resumed = make(tars, num_workers)
    resumed.load_state_dict(loader.state_dict())
    assert begun + labels(resumed) == whole[1]


def test_ranks_are_disjoint_and_complete(tars):
    ranks = [flat(labels(make(tars, rank=rank, world_size=2))) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(24))


def test_uneven_ranks_get_equally_many_batches(tars):
    for rank in range(2):
        loader = make(tars[:3], rank=rank, world_size=2)
        assert len(labels(loader)) == len(loader) == 3


def test_more_readers_than_tars_are_refused(tars):
    with pytest.raises(ValueError, match="4 tars cannot feed 6 readers"):
        make(tars, num_workers=3, rank=0, world_size=2)


def test_broken_samples_are_named_counted_and_skipped(tars, tmp_path, caplog):
    bad = {
        "a.jpg": b"", "a.cls": b"1",
        "b.jpg": jpeg(0)[:300], "b.cls": b"2",
        "c.jpg": jpeg(0),
        "d.jpg": jpeg(0), "d.cls": b"cat",
        "e.jpg": jpeg(0), "e.cls": b"99",
        "f.cls": b"3",
        "g.jpg": jpeg(70), "g.cls": b"7",
    }  # fmt: skip
    write_tar(tmp_path / "bad.tar", bad)
    loader = make([str(tmp_path / "bad.tar")], training=False, num_classes=24)
    assert labels(loader) == [[7]]
    assert loader.dataset.num_skipped == 6
    for reason in ("a: zero bytes", "b: ", "c has no label", "d has the label 'cat'", "e has class 99", "f has no im"):
        assert reason in caplog.text


def test_a_cut_tar_gives_what_it_still_has(tars, caplog):
    path = Path(tars[1])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    loader = make(tars, training=False, num_workers=2)
    found = sorted(flat(labels(loader)))
    assert set(range(6)) | set(range(12, 24)) <= set(found)
    assert len(found) < 24
    assert loader.dataset.cut == [tars[1]]
    assert "train-0001.tar is cut short" in caplog.text
    with pytest.raises(ValueError, match="is cut short: write it again"):
        make(tars, on_error="raise")
    assert 18 < count_samples(tars) < 24


def test_nothing_readable_is_refused(tmp_path):
    write_tar(tmp_path / "bad.tar", {"a.jpg": b"", "a.cls": b"1"})
    with pytest.raises(ValueError, match="none of the samples"):
        labels(make([str(tmp_path / "bad.tar")]))


def test_refusing_the_first_is_a_choice(tmp_path):
    write_tar(tmp_path / "bad.tar", {"a.jpg": b"", "a.cls": b"1"})
    with pytest.raises(ValueError, match="a: zero bytes"):
        labels(make([str(tmp_path / "bad.tar")], on_error="raise"))


def test_too_few_samples_are_refused(tars):
    with pytest.raises(ValueError, match="24 samples do not fill one batch of 25"):
        make(tars, batch_size=25)
