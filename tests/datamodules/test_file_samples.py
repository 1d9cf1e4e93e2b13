import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.image_samples import ImageSamples
from flexidit.draws import Draw, draw_flip
from flexidit.images import find_images, read_pixels


def damage(folder, *numbers):
    for number in numbers:
        (folder / f"n0000000{number // 4}" / f"{number:02d}.jpg").write_bytes(b"")


def test_a_sample_is_the_crop_or_its_mirror_image(image_folder):
    images = find_images(image_folder)
    dataset = ImageSamples(images, 16, seed=5)
    for draw in (Draw(3, epoch) for epoch in range(4)):
        pixels = read_pixels(images.path(3), 16)
        expected = pixels.flip(-1) if draw_flip(5, draw) else pixels
        assert dataset[draw]["x"].equal(expected)
    assert dataset[3]["y"] == 0


def test_broken_images_are_replaced_by_the_next_and_named(image_folder, caplog):
    damage(image_folder, 5, 6)
    dataset = ImageSamples(find_images(image_folder), 16, flip=False)
    batch = dataset.__getitems__([4, 5, 6])
    assert batch["index"].tolist() == [4, 7, 7]
    assert batch["y"].tolist() == [1, 1, 1]
    assert {skip.name: skip.reason for skip in dataset.report()} == {
        "n00000001/05.jpg": "zero bytes",
        "n00000001/06.jpg": "zero bytes",
    }
    assert "05.jpg: zero bytes" in caplog.text


def test_what_workers_find_is_known_here(image_folder):
    damage(image_folder, 0, 11)
    dataset = ImageSamples(find_images(image_folder), 16)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=lambda batch: batch)
    assert sum(len(batch["y"]) for batch in loader) == 12
    assert [skip.name for skip in dataset.report()] == ["n00000000/00.jpg", "n00000002/11.jpg"]


def test_all_broken_is_refused(image_folder):
    damage(image_folder, *range(12))
    with pytest.raises(ValueError, match="12 images in a row"):
        ImageSamples(find_images(image_folder), 16)[0]


def test_refusing_the_first_is_a_choice(image_folder):
    damage(image_folder, 1)
    dataset = ImageSamples(find_images(image_folder), 16, on_error="raise")
    assert torch.is_tensor(dataset[0]["x"])
    with pytest.raises(ValueError, match=r"01\.jpg cannot be read: zero bytes"):
        dataset[1]
