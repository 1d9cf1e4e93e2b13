import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from datamodules.loading import stream_loader
from datamodules.tar_samples import SharedSkips, TarSamples, count_samples, expand_tars
from flexidit.sample_readers import ImageReader


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
        tars, ImageReader(16), num_samples=24, batch_size=batch_size, training=training, shuffle_buffer=8, **options
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


SAMPLE = {"a.jpg": jpeg(70), "a.txt": b"a grey square"}


def make_captioned(tmp_path, members, training=False, num_samples=24, **options):
    write_tar(tmp_path / "captioned.tar", members)
    dataset = TarSamples(
        [str(tmp_path / "captioned.tar")],
        ImageReader(16),
        target="caption",
        num_samples=num_samples,
        batch_size=1,
        training=training,
        **options,
    )
    return stream_loader(dataset, 1)


def texts(loader) -> list:
    return [text for batch in loader for text in batch["texts"]]


@pytest.mark.parametrize(
    ("name", "content", "captions"),
    [
        ("b.txt", "caf\u00e9".encode(), {"caf\u00e9"}),
        ("b.txt", b"\xef\xbb\xbfone \n\n two\r\n", {"one", "two"}),
        ("b.json", b'{"caption": "one", "url": "x"}', {"one"}),
        ("b.json", b'{"text": "one"}', {"one"}),
        ("b.json", b'{"captions": ["one", "two", "one"]}', {"one", "two"}),
        ("b.JSON", b'["one", "two"]', {"one", "two"}),
    ],
)
def test_captions_are_read_as_beside_files(name, content, captions, tmp_path):
    loader = make_captioned(tmp_path, {"b.png": jpeg(70), name: content}, training=True, num_samples=1)
    assert {text for _ in range(12) for text in texts(loader)} == captions  # an epoch each
    assert not loader.dataset.report()


def test_a_text_goes_before_json_and_they_are_one_sample(tmp_path):
    members = {**SAMPLE, "a.json": b'{"caption": "other"}', "b.json": b'"lone"', "b.jpg": jpeg(0)}
    assert texts(make_captioned(tmp_path, members)) == ["a grey square", "lone"]
    assert count_samples([str(tmp_path / "captioned.tar")], "caption") == 2
    assert count_samples([str(tmp_path / "captioned.tar")]) == 0


def test_the_caption_is_a_function_of_seed_epoch_and_name(tmp_path):
    lines = {f"{number}.txt": f"{number} a\n{number} b\n{number} c".encode() for number in range(12)}
    members = {name: lines.get(name, jpeg(0)) for n in range(12) for name in (f"{n}.jpg", f"{n}.txt")}

    def epochs(seed):
        loader = make_captioned(tmp_path, members, training=True, num_samples=12, shuffle_buffer=1, seed=seed)
        return [texts(loader) for _ in range(2)]

    assert epochs(0) == epochs(0) != epochs(1)
    first, second = epochs(0)
    assert [text[:2] for text in first] == [text[:2] for text in second]
    assert first != second


CAPTION_DAMAGES = {
    "zero bytes": ({"b.jpg": b"", "b.txt": b"b"}, "b: zero bytes"),
    "not an image": ({"b.jpg": b"<html>404</html>" * 9, "b.txt": b"b"}, "b: not an image"),
    "cut image": ({"b.jpg": jpeg(0)[:300], "b.txt": b"b"}, "b: "),
    "no caption": ({"b.jpg": jpeg(0)}, "b has no caption"),
    "no image": ({"b.txt": b"b"}, "b has no image"),
    "unknown kind of image": ({"b.gif": jpeg(0), "b.txt": b"b"}, "b has no image"),
    "empty caption": ({"b.jpg": jpeg(0), "b.txt": b""}, "b: empty caption"),
    "blank caption": ({"b.jpg": jpeg(0), "b.txt": b" \n\t"}, "b: empty caption"),
    "not UTF-8": ({"b.jpg": jpeg(0), "b.txt": b"caf\xe9"}, "b: .txt is not UTF-8"),
    "broken JSON": ({"b.jpg": jpeg(0), "b.json": b'{"caption": "b'}, "b: .json broken JSON"),
    "JSON not UTF-8": ({"b.jpg": jpeg(0), "b.json": b'"caf\xe9"'}, "b: .json not UTF-8"),
    "JSON without caption": ({"b.jpg": jpeg(0), "b.json": b'{"url": "b"}'}, "b has no caption"),
    "empty list": ({"b.jpg": jpeg(0), "b.json": b'{"captions": []}'}, "b: empty caption"),
    "number as caption": ({"b.jpg": jpeg(0), "b.json": b'{"caption": 7}'}, "b: caption is int, not text"),
    "half a surrogate pair": ({"b.jpg": jpeg(0), "b.json": b'"\\ud83d"'}, "b: caption is not valid text"),
}


@pytest.mark.parametrize(("members", "message"), CAPTION_DAMAGES.values(), ids=CAPTION_DAMAGES)
def test_damaged_captioned_samples_are_named_and_skipped(members, message, tmp_path, caplog):
    loader = make_captioned(tmp_path, {**members, **SAMPLE})
    assert texts(loader) == ["a grey square"]
    assert message in caplog.text
    [skip] = loader.dataset.report()
    assert skip.name == f"{tmp_path / 'captioned.tar'}: b"
    assert message.removeprefix("b").lstrip(": ") in skip.reason
    with pytest.raises(ValueError, match="captioned.tar: b"):
        texts(make_captioned(tmp_path, {**members, **SAMPLE}, on_error="raise"))


def test_one_bad_caption_of_several_is_named_and_the_others_are_used(tmp_path):
    members = {"b.jpg": jpeg(0), "b.json": b'{"captions": ["good", "", 7]}'}
    loader = make_captioned(tmp_path, members)
    assert texts(loader) == ["good"]
    assert loader.dataset.report().by_reason() == {"empty caption": 1, "caption is int, not text": 1}


def test_a_member_twice_in_a_tar_is_named(tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [*SAMPLE.items(), *SAMPLE.items()]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    dataset = TarSamples([str(path)], ImageReader(16), target="caption", num_samples=1, batch_size=1, training=False)
    assert texts(stream_loader(dataset, 1)) == ["a grey square"]
    assert [(skip.name, skip.reason[:19]) for skip in dataset.report()] == [
        ("a.jpg", "duplicate file name"),
        ("a.txt", "duplicate file name"),
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cut_and_an_empty_tar_are_named(tars, num_workers):
    Path(tars[1]).write_bytes(Path(tars[1]).read_bytes()[:5000])
    Path(tars[2]).write_bytes(b"")
    loader = make(tars, training=False, num_workers=num_workers)
    assert set(range(6)) | set(range(18, 24)) <= set(flat(labels(loader)))
    cut = [skip.name for skip in loader.dataset.report() if skip.reason == "cut short"]
    assert cut == [tars[1], tars[2]]


def test_readers_survive_a_tar_without_any_usable_sample(tars):
    write_tar(Path(tars[0]), {"a.jpg": b"", "a.cls": b"1"})
    readers = [make(tars[:2], rank=rank, world_size=2, num_workers=1) for rank in range(2)]
    for loader in readers:
        assert set(flat(labels(loader))) <= set(range(6, 12))


@pytest.mark.parametrize("training", [False, True])
def test_captioned_tars_without_any_usable_sample_are_refused(training, tmp_path):
    with pytest.raises(ValueError, match="1 item skipped: .*captioned.tar: a \\(empty caption\\)"):
        texts(make_captioned(tmp_path, {"a.jpg": jpeg(0), "a.txt": b""}, training=training))


def test_what_workers_leave_out_is_named_here_once(tars, tmp_path):
    for tar in tars[:2]:
        write_tar(Path(tar), {"x.jpg": b"", "x.cls": b"1", **{"y.jpg": jpeg(70), "y.cls": b"7"}})
    loader = make(tars, num_workers=2)
    for _ in range(2):
        labels(loader)
    names = sorted(skip.name for skip in loader.dataset.report())
    assert names == [f"{tar}: x" for tar in tars[:2]]
    assert loader.dataset.num_skipped >= 4


def test_names_beyond_the_buffer_are_still_counted():
    skips = SharedSkips()
    for number in range(1000):
        skips.add(f"{number:05d} {'x' * 40}", "zero bytes")
    assert len(skips) == 1000
    *named, rest = skips.report()
    assert [skip.name[:5] for skip in named] == [f"{number:05d}" for number in range(len(named))]
    assert rest.reason == f"{1000 - len(named)} times, named in the log"
