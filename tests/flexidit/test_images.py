import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flexidit.images import BrokenImageError, center_crop, find_images, read_image, read_pixels, to_pixels

RAMP = np.tile(np.arange(32, dtype=np.uint8) * 8, (24, 1))


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def write_labels(folder: Path, *rows: str, header: str = "file,wnid,class_index") -> None:
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = Image.fromarray(RAMP).convert(mode)
    read = read_image(save(tmp_path / "a.png", image))
    assert (read.mode, read.size) == ("RGB", (32, 24))


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    image = Image.new("RGB", (16, 16), (200, 30, 60))
    read = read_image(save(tmp_path / "a.jpg", image.convert("CMYK"), quality=100))
    np.testing.assert_allclose(np.asarray(read)[8, 8], (200, 30, 60), atol=4)


def test_16_bit_grey_is_not_clipped_to_white(tmp_path):
    image = Image.fromarray(RAMP.astype(np.uint16) << 8)
    np.testing.assert_array_equal(np.asarray(read_image(save(tmp_path / "a.png", image)))[..., 0], RAMP)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    assert read_image(save(tmp_path / "a.jpg", Image.fromarray(RAMP), exif=exif)).size == (24, 32)


def test_broken_files_say_why(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "jpeg")
    for content, reason in ((b"", "zero bytes"), (b"hello", "not an image"), (whole.getvalue()[:900], "truncated")):
        with pytest.raises(BrokenImageError, match=reason):
            read_image(content)
    with pytest.raises(BrokenImageError, match="No such file"):
        read_image(tmp_path / "absent.jpg")


@pytest.mark.parametrize("size", [(500, 375), (100, 37), (33, 200), (64, 64), (20, 30)])
def test_crop_is_square_and_central(size):
    column, row = np.meshgrid(np.linspace(-100, 100, size[0]), np.linspace(-100, 100, size[1]))
    image = Image.fromarray(np.stack([column, row, 0 * row], -1).astype(np.int16).__add__(128).astype(np.uint8))
    crop = np.asarray(center_crop(image, 32)).astype(float)
    assert crop.shape == (32, 32, 3)
    np.testing.assert_allclose(crop[..., :2].mean((0, 1)), 128, atol=4)


def test_crop_of_an_image_of_that_size_changes_nothing():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(center_crop(image, 32)), np.asarray(image))


def test_large_images_are_halved_by_averaging():
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    crop = np.asarray(center_crop(Image.fromarray(checker).convert("RGB"), 16)).astype(int)
    assert np.ptp(crop) <= 1  # a checkerboard averages to grey; one bicubic step would alias
    assert abs(crop.mean() - 127.5) <= 1


def test_pixels_span_minus_one_to_one(tmp_path):
    image = Image.fromarray(np.array([[0, 255], [51, 204]], dtype=np.uint8)).convert("RGB")
    expected = torch.tensor([[-1.0, 1.0], [-0.6, 0.6]]).expand(3, 2, 2)
    torch.testing.assert_close(to_pixels(image), expected)
    assert read_pixels(save(tmp_path / "a.png", image), 2).shape == (3, 2, 2)


def test_folders_are_ordered_as_torchvision_orders_them(image_folder):
    from torchvision.datasets import ImageFolder

    peer = ImageFolder(str(image_folder))
    index = find_images(image_folder, num_classes=3)
    assert [(str(index.path(i)), index.labels[i]) for i in range(len(index))] == peer.samples


def test_numeric_folders_are_the_class_index(tmp_path):
    for name in ("2", "10"):
        save(tmp_path / name / "a.png", Image.new("RGB", (4, 4)))
    index = find_images(tmp_path)
    assert dict(zip(index.files, index.labels, strict=True)) == {"10/a.png": 10, "2/a.png": 2}


def test_some_wordnet_folders_of_a_larger_set_are_refused(image_folder):
    with pytest.raises(ValueError, match="3 WordNet folders but the model has 1000 classes"):
        find_images(image_folder, num_classes=1000)
    write_labels(image_folder, "n00000000,5", "n00000001,900", "n00000002,17", header="wnid,class_index")
    assert find_images(image_folder, num_classes=1000).labels == [5] * 4 + [900] * 4 + [17] * 4


def test_labels_file_of_a_flat_folder(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name, Image.new("RGB", (4, 4)))
    write_labels(tmp_path, "b.png,n01,3", "a.png,n02,1", "gone.png,n03,2")
    index = find_images(tmp_path)
    assert (index.files, index.labels) == (["a.png", "b.png"], [1, 3])
    assert {skip.name: skip.reason for skip in index.skips} == {
        "c.png": "no label",
        "gone.png": "listed in labels.csv, not found",
    }


@pytest.mark.parametrize(
    "rows, header, message",
    [
        (["a.png,x"], "file,class_index", "whole number"),
        (["a.png,1", "a.png,2"], "file,class_index", "already has class 1"),
        (["a.png,1"], "file,label", "needs the columns class_index"),
        (["b.png,1"], "file,class_index", "none of the"),
        (["a.png,12"], "file,class_index", "has class 12, but the model has 10"),
    ],
)
def test_bad_labels_are_refused(rows, header, message, tmp_path):
    save(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    write_labels(tmp_path, *rows, header=header)
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path, num_classes=10)


def test_folders_without_images_or_labels_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        find_images(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no images under"):
        find_images(tmp_path)
    save(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    with pytest.raises(ValueError, match="have no labels"):
        find_images(tmp_path)


def test_real_images_are_labelled_and_readable(test_data):
    index = find_images(test_data / "imagenet_samples", num_classes=1000)
    assert index.labels == list(range(0, 1000, 10))
    assert len(index.skips) == 0
    assert read_pixels(index.path(0), 64).shape == (3, 64, 64)
