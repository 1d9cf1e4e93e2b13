import json

import pytest
from PIL import Image

from flexidit.caption_shards import CaptionedLatents, encode_captioned
from flexidit.captioned_images import CaptionedFile, find_captioned_images
from flexidit.latent_encoding import EncodeSettings
from flexidit.latents import PixelCodec
from flexidit.sample_readers import ImageReader
from flexidit.text import WordEncoder

TEXTS = [("a red square", "something red"), ("a green field",), ("two birds", "birds on a wire", "wildlife")]


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them in a folder of its own."""
    root = tmp_path / "pictures"
    for number, name in enumerate(("a.jpg", "b.png", "sub/c.jpg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 18), (80 * number, 90, 100)).save(root / name)
    return root


def write_coco(root, **changes):
    """COCO annotations of the three images, with fields replaced by lists, or extended by functions of them."""
    names = ["a.jpg", "b.png", "c.jpg"]
    captions = [(number, text) for number, texts in enumerate(TEXTS) for text in texts]
    content = {
        "images": [{"id": 10 + number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"id": key, "image_id": 10 + number, "caption": text} for key, (number, text) in enumerate(captions)
        ],
    }
    for name, change in changes.items():
        content[name] = change(content[name])
    path = root / "annotations" / "captions_x.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_lines(root, *more):
    lines = [
        json.dumps({"file_name": "a.jpg", "captions": TEXTS[0]}).encode(),
        json.dumps({"file_name": "b.png", "text": TEXTS[1][0], "other": 3}).encode(),
        *(json.dumps({"file_name": "sub/c.jpg", "text": text}).encode() for text in TEXTS[2]),
    ]
    path = root / "metadata.jsonl"
    path.write_bytes(b"\n".join([*lines, *more]) + b"\n")
    return path


def write_sidecars(root):
    (root / "a.txt").write_text("\n".join(TEXTS[0]) + "\n\n")
    (root / "b.json").write_text(json.dumps({"caption": TEXTS[1][0]}))
    (root / "sub" / "c.json").write_text(json.dumps(TEXTS[2]))


EXPECTED = [CaptionedFile(file, texts) for file, texts in zip(("a.jpg", "b.png", "sub/c.jpg"), TEXTS, strict=True)]


@pytest.mark.parametrize("write", [write_coco, write_lines, write_sidecars])
def test_every_kind_of_source_gives_the_same_index(write, folder):
    write(folder)
    index = find_captioned_images(folder)
    assert index.items == EXPECTED
    assert (len(index), index.num_captions, len(index.skips)) == (3, 6, 0)
    assert index.files == ["a.jpg", "b.png", "sub/c.jpg"]
    assert all(index.path(number).is_file() for number in range(3))


def test_sources_can_be_named_and_lie_elsewhere(folder, tmp_path):
    coco, lines = write_coco(folder), write_lines(folder)
    for path in (coco, lines):
        moved = path.rename(tmp_path / path.name)
        assert find_captioned_images(folder, moved).items == EXPECTED
    other = tmp_path / "texts"
    (other / "sub").mkdir(parents=True)
    write_sidecars(other)
    assert find_captioned_images(folder, other).items == EXPECTED


def test_the_metadata_come_before_annotations_and_those_before_files_beside(folder):
    (folder / "a.txt").write_text("from the file beside")
    write_coco(folder)
    assert find_captioned_images(folder).items == EXPECTED
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "from the lines"}')
    assert find_captioned_images(folder).items == [CaptionedFile("a.jpg", ("from the lines",))]


def test_coco_own_layout_is_found_from_the_folder_of_images(folder):
    path = write_coco(folder.parent)
    path.rename(path.with_name("captions_pictures.json"))
    assert find_captioned_images(folder).items == EXPECTED


def test_several_annotations_must_be_chosen_from(folder):
    path = write_coco(folder)
    path.with_name("captions_y.json").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"several annotations \(captions_x.json, captions_y.json\)"):
        find_captioned_images(folder)
    assert find_captioned_images(folder, path).items == EXPECTED


def test_only_folders_that_the_source_speaks_of_are_expected_to_have_captions(folder):
    write_coco(folder, images=lambda images: images[2:], annotations=lambda entries: entries[3:])
    index = find_captioned_images(folder)
    assert (index.files, len(index.skips)) == (["sub/c.jpg"], 0)


def test_a_text_file_comes_before_a_json_file(folder):
    """Tools that download captioned images write both, with the caption in both."""
    write_sidecars(folder)
    (folder / "a.json").write_text(json.dumps({"caption": "another", "width": 3}))
    assert find_captioned_images(folder).items == EXPECTED


def test_paths_may_begin_with_the_folder_or_a_dot(folder):
    lines = [{"file_name": "./a.jpg", "text": "one"}, {"file_name": "pictures/b.png", "text": "two"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert find_captioned_images(folder).files == ["a.jpg", "b.png"]


# what is damaged is named


def sidecar(name, data):
    return lambda root: (write_sidecars(root), (root / name).write_bytes(data))


def lines(*more):
    return lambda root: write_lines(root, *more)


def coco(**changes):
    return lambda root: write_coco(root, **changes)


def also(*entries):
    return lambda found: [*found, *entries]


def without(count):
    return lambda found: found[:-count]


@pytest.mark.parametrize(
    "damage, expected",
    [
        # missing image
        (lines(b'{"file_name": "d.jpg", "text": "x"}'), [("d.jpg", "image not found")]),
        (coco(images=also({"id": 5, "file_name": "d.jpg"})), [("d.jpg", "image not found")]),
        (coco(annotations=also({"id": 9, "image_id": 77, "caption": "x"})), [("annotation 9", "77 is not listed")]),
        (sidecar("d.txt", b"x"), [("d.txt", "no image of this name")]),
        (sidecar("d.json", b'"x"'), [("d.json", "no image of this name")]),
        # missing caption
        (coco(annotations=without(3)), [("sub/c.jpg", "no caption")]),
        (lines(b'{"file_name": "a.jpg"}'), [("line 6", "no text")]),
        (lambda root: (write_sidecars(root), (root / "a.txt").unlink()), [("a.jpg", "no caption")]),
        # empty caption
        (lines(b'{"file_name": "a.jpg", "text": " "}'), [("line 6 (a.jpg)", "empty caption")]),
        (coco(annotations=also({"id": 9, "image_id": 10, "caption": ""})), [("annotation 9", "empty caption")]),
        (sidecar("a.txt", b" \n\n"), [("a.jpg", "empty caption")]),
        (sidecar("b.json", b""), [("b.png", "empty caption")]),
        (sidecar("b.json", b'{"captions": []}'), [("b.png", "empty caption")]),
        # no text
        (coco(annotations=also({"id": 9, "image_id": 10})), [("annotation 9", "caption is NoneType, not text")]),
        (sidecar("b.json", b'{"captions": [3]}'), [("b.png", "caption is int, not text")]),
        (lines(b'{"file_name": "a.jpg", "text": "\\ud800"}'), [("line 6 (a.jpg)", "not valid text")]),
        # non-UTF-8
        (sidecar("a.txt", b"caf\xe9"), [("a.jpg", "a.txt is not UTF-8")]),
        (sidecar("b.json", b'"caf\xe9"'), [("b.png", "b.json not UTF-8")]),
        (lines(b'{"file_name": "a.jpg", "text": "caf\xe9"}'), [("line 6", "not UTF-8")]),
        # broken JSON
        (lines(b'{"file_name": "a.jpg", "te'), [("line 6", "broken JSON")]),
        (lines(b"[" * 100_000), [("line 6", "broken JSON")]),
        (lines(b'["a.jpg"]'), [("line 6", "no file_name")]),
        (sidecar("b.json", b'{"caption": '), [("b.png", "b.json broken JSON")]),
        (coco(images=also("a.jpg", {"id": [1], "file_name": "a.jpg"})), [("image 3", "no id"), ("image 4", "no id")]),
        (coco(annotations=also(None)), [("annotation 6", "None is not listed")]),
        # duplicates
        (lines(b'{"file_name": "a.jpg", "text": "a red square"}'), [("line 6 (a.jpg)", "duplicate caption")]),
        (coco(annotations=lambda found: [*found, found[0]]), [("annotation 0", "duplicate caption")]),
        (coco(images=lambda found: [*found, found[0]]), [("a.jpg", "id 10 is listed twice")]),
        (sidecar("a.txt", b"x\nx"), [("a.jpg", "duplicate caption")]),
    ],
)
def test_damaged_entries_are_named_and_leave_the_others(damage, expected, folder):
    damage(folder)
    index = find_captioned_images(folder)
    found = [(skip.name, skip.reason) for skip in index.skips]
    assert len(found) == len(expected)
    for (name, reason), (expected_name, expected_reason) in zip(found, expected, strict=True):
        assert expected_name in name and expected_reason in reason
    changed = {"a.jpg", *(name for name, _ in expected)}
    assert [item for item in index.items if item.file not in changed] == [
        item for item in EXPECTED if item.file not in changed
    ]


def test_names_that_several_images_have_are_not_guessed(folder):
    Image.new("RGB", (9, 9)).save(folder / "sub" / "a.jpg")
    Image.new("RGB", (9, 9)).save(folder / "sub" / "b.png")
    (folder / "a.jpg").rename(folder / "sub" / "d.jpg")
    (folder / "metadata.jsonl").write_text('{"file_name": "c.jpg", "text": "x"}\n{"file_name": "b.png", "text": "y"}')
    assert find_captioned_images(folder).items == [CaptionedFile("b.png", ("y",)), CaptionedFile("sub/c.jpg", ("x",))]
    (folder / "b.png").rename(folder / "sub" / "c.png")
    (folder / "c.png").write_bytes(b"")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n{"file_name": "c.png", "text": "y"}')
    (folder / "c.png").rename(folder / "e.png")
    Image.new("RGB", (9, 9)).save(folder / "sub" / "e.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n{"file_name": "x/e.png", "text": "y"}')
    assert ("x/e.png", "image not found") in [(s.name, s.reason) for s in find_captioned_images(folder).skips]


@pytest.mark.parametrize(
    "write, error, message",
    [
        (lambda root: None, ValueError, "no image in .* has a caption in .*3 items skipped"),
        (lambda root: write_coco(root).write_text("{"), ValueError, "captions_x.json cannot be read: broken JSON"),
        (lambda root: write_coco(root).write_bytes(b'"\xff"'), ValueError, "captions_x.json cannot be read: not UTF-8"),
        (lambda root: write_coco(root).write_text("[]"), ValueError, "is not COCO's annotation of captions"),
        (lambda root: write_coco(root).write_text('{"images": []}'), ValueError, "needs lists named images and annot"),
        (lambda root: write_lines(root).write_bytes(b"\xff\xfe\n"), ValueError, r"metadata.jsonl line 1 \(not UTF-8\)"),
    ],
)
def test_a_source_without_use_is_one_sentence(write, error, message, folder):
    write(folder)
    with pytest.raises(error, match=message) as caught:
        find_captioned_images(folder)
    assert "\n" not in str(caught.value)


def test_absent_places_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        find_captioned_images(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no images in"):
        find_captioned_images((tmp_path / "empty").mkdir() or tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no captions at"):
        find_captioned_images(folder, tmp_path / "absent.json")
    with pytest.raises(ValueError, match="is no source of captions"):
        find_captioned_images(folder, folder / "a.jpg")


# damaged images are named where they are read


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda path: path.write_bytes(b""), "zero bytes"),
        (cut, "Truncated"),
        (lambda path: path.write_text("a caption, not an image"), "not an image"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_damaged_images_are_named_by_the_encoding(damage, reason, folder, tmp_path):
    write_lines(folder)
    index = find_captioned_images(folder)
    damage(folder / "a.jpg")
    settings = EncodeSettings(ImageReader(8), batch_size=2, flip=False)
    result = encode_captioned(index, WordEncoder(8, 4), PixelCodec(), tmp_path / "out", settings)
    assert [skip.name for skip in result.skips] == ["a.jpg"]
    assert reason in result.skips.skips[0].reason
    assert CaptionedLatents(tmp_path / "out").indices.tolist() == [1, 2]


def test_real_coco_annotations(test_data):
    for root in (test_data / "coco_mini", test_data / "coco_mini" / "train2017"):
        index = find_captioned_images(root)
        assert (len(index), index.num_captions, len(index.skips)) == (80, 400, 0)
        assert all(index.path(number).is_file() for number in range(80))
