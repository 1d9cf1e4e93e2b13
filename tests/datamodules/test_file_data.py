import json

import pytest

from datamodules.file_data import FileDataModule, source_kind
from datamodules.imagenet import ImageNetDataModule
from datamodules.text_image import TextImageDataModule
from flexidit.images import find_images
from flexidit.latent_encoding import EncodeSettings, encode_images
from flexidit.latents import LatentCodec
from flexidit.sample_readers import ImageReader


def test_kinds_are_told_apart(image_folder, kl_vae, tmp_path):
    settings = EncodeSettings(ImageReader(16), shard_size=5, dtype="float32")
    encode_images(find_images(image_folder), LatentCodec(kl_vae), tmp_path / "latents", settings)
    assert source_kind(image_folder) == "files"
    assert source_kind(tmp_path / "latents") == "latents"
    assert source_kind("a-{00..12}.tar") == source_kind("b.tar") == "tars"
    with pytest.raises(FileNotFoundError, match="no data at"):
        source_kind(tmp_path / "absent")


def captioned(folder):
    lines = [{"file_name": path.relative_to(folder).as_posix(), "text": path.name} for path in folder.rglob("*.jpg")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_labelled_and_captioned_images_are_the_same_images(image_folder, kl_vae):
    captioned(image_folder)
    options = {"image_size": 16, "batch_size": 4, "num_workers": 0, "vae": str(kl_vae), "flip": True, "seed": 5}
    labelled = ImageNetDataModule(str(image_folder), num_classes=3, val_fraction=0.25, **options)
    texts = TextImageDataModule(str(image_folder), text_encoder="words", val_fraction=0.25, **options)
    for name in ("train_dataloader", "val_dataloader"):
        for a, b in zip(getattr(labelled, name)(), getattr(texts, name)(), strict=True):
            assert labelled.on_after_batch_transfer(a, 0)["x"].equal(texts.on_after_batch_transfer(b, 0)["x"])
    assert labelled.sample_shape == texts.sample_shape
    assert labelled.fingerprint == {name: texts.fingerprint[name] for name in labelled.fingerprint}


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="val_fraction is at least 0 and below 1, got 1"):
        ImageNetDataModule("anywhere", val_fraction=1.0)


@pytest.mark.parametrize("data_module", [ImageNetDataModule, TextImageDataModule])
def test_both_kinds_share_the_base(data_module):
    assert issubclass(data_module, FileDataModule)
