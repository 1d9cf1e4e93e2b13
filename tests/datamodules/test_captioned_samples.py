import json
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.captioned_samples import CaptionedSamples
from flexidit.captioned_images import find_captioned_images
from flexidit.draws import Draw
from flexidit.images import read_pixels
from flexidit.sample_readers import ImageReader


@pytest.fixture
def captioned_folder(image_folder):
    """The twelve images with a text beside each: one line for the first, three for the others."""
    for number, path in enumerate(sorted(image_folder.rglob("*.jpg"))):
        lines = [f"image {number} line {line}" for line in range(3 if number else 1)]
        path.with_suffix(".txt").write_text("\n".join(lines))
    return image_folder


def make(folder, **options):
    return CaptionedSamples(find_captioned_images(folder), ImageReader(16), **options)


def test_a_sample_is_the_crop_and_one_of_its_captions(captioned_folder):
    dataset = make(captioned_folder)
    batch = dataset.__getitems__([Draw(4, 1), Draw(0, 1)])
    assert batch["x"].equal(torch.stack([read_pixels(captioned_folder / dataset.files[index], 16) for index in (4, 0)]))
    assert batch["texts"][0] in dataset.captions[4]
    assert batch["texts"][1] == "image 0 line 0"
    assert batch["index"].tolist() == [4, 0]
    assert batch["epoch"].tolist() == [1, 1]
    assert dataset[Draw(4, 1)]["texts"] == batch["texts"][0]


def test_the_caption_is_a_function_of_seed_epoch_and_image(captioned_folder):
    def texts(seed, epoch, order=range(12)):
        batch = make(captioned_folder, seed=seed).__getitems__([Draw(index, epoch) for index in order])
        return dict(zip(batch["index"].tolist(), batch["texts"], strict=True))

    assert texts(0, 0) == texts(0, 0, reversed(range(12)))
    assert texts(0, 0) != texts(0, 1) != texts(1, 1)


def test_each_caption_is_drawn_equally_often(captioned_folder):
    dataset = make(captioned_folder)
    counts = Counter(dataset.targets([Draw(3, epoch) for epoch in range(3000)])["texts"])
    assert set(counts) == set(dataset.captions[3])
    assert all(abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for count in counts.values())


def test_a_broken_image_is_replaced_with_its_captions(captioned_folder):
    dataset = make(captioned_folder)
    (captioned_folder / dataset.files[5]).write_bytes(b"")
    batch = dataset.__getitems__([5])
    assert batch["index"].tolist() == [6]
    assert batch["texts"][0].startswith("image 6 ")


def test_images_are_not_mirrored_unless_asked(captioned_folder):
    draws = [Draw(2, epoch) for epoch in range(8)]
    plain, mirrored = make(captioned_folder), make(captioned_folder, flip=True)
    assert len({tuple(plain[draw]["x"].flatten().tolist()) for draw in draws}) == 1
    assert len({tuple(mirrored[draw]["x"].flatten().tolist()) for draw in draws}) == 2


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def swap_for_json(path, content):
    path.with_suffix(".txt").unlink()
    path.with_suffix(".json").write_bytes(content)


DAMAGES = {
    "zero bytes": (lambda path: path.write_bytes(b""), "zero bytes"),
    "not an image": (lambda path: path.write_bytes(b"<html>404</html>" * 9), "not an image"),
    "cut image": (truncate, ""),
    "no caption": (lambda path: path.with_suffix(".txt").unlink(), "no caption"),
    "no image": (lambda path: path.unlink(), "no image of this name"),
    "empty caption": (lambda path: path.with_suffix(".txt").write_bytes(b""), "empty caption"),
    "blank caption": (lambda path: path.with_suffix(".txt").write_bytes(b" \n\t\n"), "empty caption"),
    "not UTF-8": (lambda path: path.with_suffix(".txt").write_bytes(b"caf\xe9"), "not UTF-8"),
    "broken JSON": (lambda path: swap_for_json(path, b'{"caption": "a'), "broken JSON"),
    "JSON not UTF-8": (lambda path: swap_for_json(path, b'{"caption": "caf\xe9"}'), "not UTF-8"),
    "JSON without caption": (lambda path: swap_for_json(path, b'{"url": "a"}'), ""),
    "number as caption": (lambda path: swap_for_json(path, b'{"caption": 7}'), "not text"),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_the_rest_is_read(damage, reason, num_workers, captioned_folder):
    path = captioned_folder / "n00000001" / "07.jpg"
    damage(path)
    dataset = make(captioned_folder)
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=lambda batch: batch)
    texts = [text for batch in loader for text in batch["texts"]]
    assert len(texts) == len(dataset)
    assert not any(text.startswith("image 7 ") for text in texts)
    assert {int(text.split()[1]) for text in texts} == set(range(12)) - {7}
    [skip] = dataset.report()
    assert skip.name.startswith("n00000001/07.")
    assert reason in skip.reason


@pytest.mark.parametrize("name", ["no caption", "empty caption", "not UTF-8", "broken JSON"])
def test_refusing_incomplete_data_is_a_choice(name, captioned_folder):
    DAMAGES[name][0](captioned_folder / "n00000001" / "07.jpg")
    with pytest.raises(ValueError, match=r"1 item skipped: n00000001/07\.jpg .* set on_error to skip"):
        make(captioned_folder, on_error="raise")


def test_a_caption_said_twice_is_no_damage(captioned_folder):
    entries = [{"file_name": "00.jpg", "captions": ["a", "a"]}, {"file_name": "04.jpg", "text": "b"}]
    (captioned_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    for folder, number in (("n00000000", "00"), ("n00000001", "04")):
        for path in (captioned_folder / folder).glob("*.jpg"):
            if path.stem != number:
                path.unlink()
    dataset = make(captioned_folder, on_error="raise")
    assert dataset.captions == [("a",), ("b",)]
    assert dataset.report().by_reason() == {"duplicate caption": 1}
