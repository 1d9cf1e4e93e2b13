from datamodules.image_samples import ImageSamples
from flexidit.images import find_images


def test_labels_are_those_of_the_images(image_folder):
    images = find_images(image_folder)
    assert ImageSamples(images, 16).__getitems__([11, 0, 4])["y"].tolist() == [images.labels[i] for i in (11, 0, 4)]


def test_missing_labels_are_in_the_report(image_folder):
    (image_folder / "n00000000" / "00.jpg").rename(image_folder / "stray.jpg")
    report = ImageSamples(find_images(image_folder), 16).report()
    assert report.by_reason() == {"no label": 1}
