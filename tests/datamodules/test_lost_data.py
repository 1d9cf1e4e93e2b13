"""Data that go under a running job: processes that die, tars and files that vanish; and ranks that stay in step."""

from __future__ import annotations

import io
import os
import re
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from datamodules.image_samples import ImageSamples
from datamodules.loading import ResumableLoader, map_loader, stream_loader
from datamodules.tar_samples import TarSamples, expand_tars
from flexidit.draws import Draw
from flexidit.images import find_images
from flexidit.sample_readers import ImageReader
from flexidit.worker_faults import explain_worker


class Slow(Dataset[Any]):
    """Batches say which process read them."""

    def __getitems__(self, keys: list[Draw]) -> dict[str, Any]:
        time.sleep(0.01)
        return {"x": torch.tensor([key.sample for key in keys]), "process": os.getpid()}

    def __len__(self) -> int:
        return 400


def loader_of(dataset: Dataset[Any], num_workers: int = 2) -> ResumableLoader:
    options: dict[str, Any] = {"training": True, "trainer": None, "num_workers": num_workers}
    return map_loader(dataset, range(400), batch_size=2, **options)


def consume(loader: ResumableLoader) -> None:
    for _ in loader:
        time.sleep(0.001)


def test_a_process_that_is_killed_ends_the_run_in_one_sentence() -> None:
    def read_and_kill() -> None:
        for number, batch in enumerate(loader_of(Slow())):
            if number == 5:
                os.kill(batch["process"], signal.SIGKILL)
            time.sleep(0.001)

    started = time.monotonic()
    with pytest.raises((OSError, RuntimeError)) as raised:
        read_and_kill()
    # The signal may be noticed outside of the loader, as in the middle of a step; the command says the same then.
    said = str(explain_worker(raised.value) or raised.value)
    message = r"process \d+, which read data, died \(Killed\): .* memory: lower data.num_workers, .* --ckpt_path last"
    assert re.fullmatch(message, said)
    assert time.monotonic() - started < 60  # no hang


class Broken(Slow):
    def __getitems__(self, keys: list[Draw]) -> dict[str, Any]:
        raise ValueError("train/a.jpg cannot be read: mend it")


def test_what_a_process_says_arrives_without_its_traceback() -> None:
    for num_workers in (0, 2):
        with pytest.raises(ValueError, match=r"^train/a\.jpg cannot be read: mend it$"):
            consume(loader_of(Broken(), num_workers))


def image(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level, level, level)).save(buffer, "png")
    return buffer.getvalue()


def write_tars(folder: Path, sizes: list[int]) -> list[str]:
    number = 0
    for tar, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{tar:02d}.tar", "w") as archive:
            for _ in range(size):
                for name, content in ((f"{number:03d}.png", image(number)), (f"{number:03d}.cls", b"%d" % number)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                number += 1
    return expand_tars(folder)


def stream(tars: list[str], training: bool = True, num_workers: int = 0, **options: Any) -> ResumableLoader:
    given = {"num_samples": 24, "shuffle_buffer": 1, **options}
    dataset = TarSamples(tars, ImageReader(16), batch_size=2, training=training, **given)
    return stream_loader(dataset, 2, num_workers)


def flat(batches: Any) -> list[int]:
    return [label for batch in batches for label in batch["y"].tolist()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_tar_that_is_deleted_under_a_job_is_named_and_all_ranks_make_as_many_batches(
    tmp_path: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    tars = write_tars(tmp_path, [6] * 8)
    ranks = [stream(tars, num_samples=48, rank=rank, world_size=2, num_workers=num_workers) for rank in range(2)]
    for loader in ranks:
        passes = iter(loader)
        next(passes)
        Path(tars[0]).unlink(missing_ok=True)  # now, and for the next epoch
        assert len(list(passes)) == len(loader) - 1 == 11
    for loader in ranks:
        labels = flat(loader)
        assert len(labels) == 24
        assert not set(labels) & set(range(6))
    reasons = {skip.name: skip.reason for loader in ranks for skip in loader.dataset.report()}
    assert reasons == {tars[0]: "No such file or directory"}


def test_a_tar_that_is_deleted_ends_the_run_by_choice(tmp_path: Path) -> None:
    tars = write_tars(tmp_path, [6] * 4)
    for num_workers in (0, 2):
        loader = stream(tars, on_error="raise", num_workers=num_workers)
        list(loader)
        Path(tars[0]).rename(tmp_path / "away")
        with pytest.raises(ValueError, match=r"train-00.tar: No such file or directory$"):
            list(loader)
        (tmp_path / "away").rename(tars[0])


def test_a_file_that_is_deleted_under_a_job_is_named_and_replaced(image_folder: Path) -> None:
    index = find_images(image_folder)
    dataset = ImageSamples(index, 16)
    index.path(3).unlink()
    batch = dataset.__getitems__([Draw(sample) for sample in range(12)])
    assert batch["names"] == [*index.files[:3], index.files[4], *index.files[4:]]
    assert [(skip.name, skip.reason) for skip in dataset.report()] == [(index.files[3], "No such file or directory")]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sizes", [[6, 6, 6, 6], [9, 1, 4], [5], [1, 2, 3, 4, 5, 6, 7]])
def test_ranks_evaluate_equally_many_batches_and_leave_nothing_out(
    tmp_path: Path, sizes: list[int], num_workers: int
) -> None:
    tars = write_tars(tmp_path, sizes)
    ranks = [stream(tars, False, num_workers, rank=rank, world_size=2) for rank in range(2)]
    batches = [list(loader) for loader in ranks]
    assert len(batches[0]) == len(batches[1]) == len(ranks[0]) == len(ranks[1])
    first_read = [batch for rank in batches for batch in rank if not batch.get("repeated")]
    assert sorted(flat(first_read)) == list(range(sum(sizes)))  # what counts is everything, once
    assert flat(batches[0]) == flat(ranks[0])  # the same every time
    alone = stream(tars, False, num_workers)
    assert sorted(flat(alone)) == list(range(sum(sizes)))


def test_broken_samples_do_not_make_a_rank_run_short(tmp_path: Path) -> None:
    tars = write_tars(tmp_path, [6, 6])
    cut = Path(tars[1]).read_bytes()
    Path(tars[1]).write_bytes(cut.replace(image(7), b"\0" * len(image(7))))
    lengths = [len(list(stream(tars, False, rank=rank, world_size=2))) for rank in range(2)]
    assert lengths == [3, 3]


def test_a_rank_without_any_sample_says_so(tmp_path: Path) -> None:
    tars = write_tars(tmp_path, [6, 6])
    content = Path(tars[1]).read_bytes()
    Path(tars[1]).write_bytes(content.replace(b".png", b".pnk"))
    with pytest.raises(ValueError, match="finds no sample to evaluate"):
        list(stream(tars, False, rank=1, world_size=2))


class Endless(IterableDataset[Any]):
    """What a stream must tell its loader."""

    shuffle, seed, size, num_replicas, num_batches = True, 0, 8, 1, 4
    looks = 0

    def seek(self, epoch: int) -> None: ...

    def check_files(self) -> None:
        self.looks += 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(99))


def test_files_are_looked_at_when_a_pass_begins_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Endless()
    loader = ResumableLoader(dataset, batch_size=1)
    list(loader)
    list(loader)
    assert dataset.looks == 2
    monkeypatch.setattr("datamodules.loading._SECONDS_BETWEEN_LOOKS", -1.0)
    list(loader)
    assert dataset.looks == 2 + 5  # before each batch, and before the end
