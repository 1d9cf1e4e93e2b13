import json
import logging

import lightning as L
import pytest
import torch
import webdataset as wds
from torch import nn

from datamodules.loading import ResumableLoader
from datamodules.text_image import TextImageDataModule
from flexidit.caption_shards import encode_captioned
from flexidit.captioned_images import find_captioned_images
from flexidit.conditions import Captions
from flexidit.latent_encoding import EncodeSettings
from flexidit.latents import LatentCodec
from flexidit.sample_readers import ImageReader
from flexidit.text import make_text_encoder

WORDS = "words:8x6"
COMMON = {"image_size": 16, "batch_size": 4, "num_workers": 0, "text_encoder": WORDS}


def caption(image: int, line: int) -> str:
    return f"image {image} line {line}"


@pytest.fixture
def folder(image_folder):
    """The twelve images, with two captions each in metadata.jsonl."""
    names = [path.relative_to(image_folder).as_posix() for path in sorted(image_folder.rglob("*.jpg"))]
    entries = [{"file_name": name, "captions": [caption(i, line) for line in (0, 1)]} for i, name in enumerate(names)]
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return image_folder


@pytest.fixture
def latents(folder, kl_vae, tmp_path):
    encode_captioned(
        find_captioned_images(folder),
        codec=LatentCodec(kl_vae),
        encoder=make_text_encoder(WORDS),
        out=tmp_path / "latents",
        settings=EncodeSettings(ImageReader(16), shard_size=5, dtype="float32"),
    )
    return tmp_path / "latents"


@pytest.fixture
def tars(folder, tmp_path):
    """Two tars of six samples: captions as text in one, as JSON in the other."""
    (tmp_path / "tars").mkdir()
    for tar in range(2):
        with wds.TarWriter(str(tmp_path / "tars" / f"{tar}.tar")) as writer:
            for i, item in enumerate(find_captioned_images(folder).items[6 * tar : 6 * tar + 6], 6 * tar):
                text = {"txt": "\n".join(item.captions)} if tar else {"json": {"captions": list(item.captions)}}
                writer.write({"__key__": f"{i:02d}", "jpg": (folder / item.file).read_bytes(), **text})
    return tmp_path / "tars"


def batches(data, loader):
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def texts_of(y: Captions) -> list[str]:
    """The captions behind embeddings."""
    texts = [caption(image, line) for image in range(12) for line in range(2)]
    known = make_text_encoder(WORDS).encode(texts).embeddings
    return [texts[int((known == row).flatten(1).all(1).nonzero())] for row in y.embeddings]


def images_of(y: Captions) -> list[int]:
    return [int(text.split()[1]) for text in texts_of(y)]


def test_encoding_on_the_fly_equals_what_is_stored(folder, latents, kl_vae):
    stored = TextImageDataModule(str(latents), vae=str(kl_vae), seed=3, flip=True, **COMMON)
    fly = TextImageDataModule(str(folder), vae=str(kl_vae), seed=3, flip=True, **COMMON)
    for _ in range(2):
        pairs = zip(batches(stored, stored.train_dataloader()), batches(fly, fly.train_dataloader()), strict=True)
        for a, b in pairs:
            assert a["y"].embeddings.equal(b["y"].embeddings)
            assert a["y"].mask.equal(b["y"].mask)
            torch.testing.assert_close(a["x"], b["x"], atol=1e-5, rtol=1e-5)
    assert stored.fingerprint == fly.fingerprint
    assert stored.sample_shape == fly.sample_shape == (4, 4, 4)
    assert stored.caption_shape == fly.caption_shape == (6, 8)
    assert stored.null_captions.embeddings.equal(fly.null_captions.embeddings)
    assert len(stored.null_captions) == 1 == int(stored.null_captions.mask.sum())


@pytest.mark.parametrize("kind", ["latents", "folder", "tars"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_source_gives_captions_that_belong_to_their_images(kind, num_workers, request):
    source = request.getfixturevalue(kind)
    request.getfixturevalue("latents")
    data = TextImageDataModule(str(source), **{**COMMON, "num_workers": num_workers})
    epochs = [batches(data, loader) for loader in [data.train_dataloader()] for _ in range(4)]
    for batch in epochs[0]:
        assert set(batch) == {"x", "y", "names"}
        assert batch["x"].shape == (4, *data.sample_shape)
        assert batch["x"].dtype == torch.float32
        assert batch["y"].embeddings.shape == (4, *data.caption_shape)
        assert batch["y"].image_size is None
    seen = [{i: t for b in epoch for i, t in zip(images_of(b["y"]), texts_of(b["y"]), strict=True)} for epoch in epochs]
    if kind != "tars" or not num_workers:  # readers of tars begin theirs again until the epoch's batches are full
        assert all(set(epoch) == set(range(12)) for epoch in seen)
    assert all(len({epoch[image] for epoch in seen if image in epoch}) <= 2 for image in range(12))
    assert len({tuple(sorted(epoch.values())) for epoch in seen}) > 1  # drawn anew
    assert not any(len(report) for report in data.skipped().values())


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_pixels_and_captions_stay_together(kind, folder, request):
    from flexidit.images import read_pixels

    images = find_captioned_images(folder)
    data = TextImageDataModule(str(request.getfixturevalue(kind)), **COMMON)
    for batch in batches(data, data.train_dataloader()):
        for pixels, image in zip(batch["x"], images_of(batch["y"]), strict=True):
            assert pixels.equal(read_pixels(images.path(image), 16))


def test_coco_annotations_of_training_and_validation(image_folder, tmp_path):
    names = [path.relative_to(image_folder).as_posix() for path in sorted(image_folder.rglob("*.jpg"))]
    for split, chosen in (("train", range(8)), ("val", range(8, 12))):
        content = {
            "images": [{"id": i, "file_name": names[i]} for i in chosen],
            "annotations": [{"id": i, "image_id": i, "caption": caption(i, 0)} for i in chosen],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    data = TextImageDataModule(
        str(image_folder),
        val=str(image_folder) + "/",
        captions=str(tmp_path / "train.json"),
        val_captions=str(tmp_path / "val.json"),
        **COMMON,
    )
    assert {i for b in batches(data, data.train_dataloader()) for i in images_of(b["y"])} == set(range(8))
    assert [i for b in batches(data, data.val_dataloader()) for i in images_of(b["y"])] == [8, 9, 10, 11]


def test_held_out_images_are_not_trained_on_and_never_change(latents):
    data = TextImageDataModule(str(latents), val_fraction=0.25, **COMMON)
    loader = data.val_dataloader()
    first, second = ([(batch["x"], batch["y"].embeddings) for batch in loader] for _ in range(2))
    assert all(a.equal(b) and c.equal(d) for (a, c), (b, d) in zip(first, second, strict=True))
    used = {image for batch in data.train_dataloader() for image in images_of(batch["y"])}
    assert used.isdisjoint(image for batch in loader for image in images_of(batch["y"]))


def test_tars_validate_in_order_and_cannot_hold_out(tars):
    data = TextImageDataModule(str(tars), val=str(tars), **COMMON)
    assert [i for batch in batches(data, data.val_dataloader()) for i in images_of(batch["y"])] == list(range(12))
    with pytest.raises(ValueError, match="cannot hold out"):
        TextImageDataModule(str(tars), val_fraction=0.1, **COMMON).setup()
    assert TextImageDataModule(str(tars), **COMMON).val_dataloader() == []


def test_a_setup_that_failed_fails_again(folder, tmp_path):
    data = TextImageDataModule(str(folder), val=str(tmp_path / "absent"), **COMMON)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="no data at"):
            data.setup()


def test_what_does_not_fit_the_run_is_refused(folder, tars, latents, kl_vae, tiny_vae):
    def refused(match, source, **options):
        with pytest.raises(ValueError, match=match):
            TextImageDataModule(str(source), **{**COMMON, **options}).setup()

    refused(r"codec\.class = 'AutoencoderKL', this run is configured for 'AutoencoderTiny'", latents, vae=str(tiny_vae))
    refused(r"text_encoder\.width = 8, this run is configured for 64", latents, text_encoder="words")
    refused("image_size = 16, this run is configured for 32", latents, image_size=32)
    refused("up to 5 tokens", latents, caption_length=3)
    refused("18 is not divisible", folder, vae=str(kl_vae), image_size=18)
    for source in (folder, tars):
        refused("need text_encoder", source, text_encoder=None)


def test_latents_need_no_encoders(latents):
    data = TextImageDataModule(str(latents), **{**COMMON, "text_encoder": None})
    assert batches(data, data.train_dataloader())[0]["y"].embeddings.shape == (4, 6, 8)
    data = TextImageDataModule(str(latents), caption_length=5, **COMMON)
    assert batches(data, data.train_dataloader())[0]["y"].embeddings.shape == (4, 5, 8)
    assert data.null_captions.embeddings.shape == (1, 5, 8)


def test_captions_that_are_too_long_are_counted_once(folder, caplog):
    data = TextImageDataModule(str(folder), **{**COMMON, "text_encoder": "words:8x4"})
    for _ in range(6):
        assert batches(data, data.train_dataloader())[0]["y"].embeddings.shape == (4, 4, 8)
    cut = data.skipped()["captions"]
    assert len({skip.name for skip in cut}) == len(cut) <= 24
    assert cut.by_reason() == {"cut to 4 tokens": len(cut)}
    assert sum("cut to 4 tokens: image" in record.message for record in caplog.records) == min(10, len(cut))


@pytest.mark.parametrize("kind", ["latents", "folder", "tars"])
def test_what_was_left_out_is_told(kind, folder, request, caplog):
    source = request.getfixturevalue(kind)
    damaged = {"latents": "shard-00001.safetensors", "folder": "n00000000/02.jpg", "tars": "2.tar"}[kind]
    if kind == "tars":
        with wds.TarWriter(str(source / damaged)) as writer:
            writer.write({"__key__": "lone", "jpg": b"of no caption"})
    else:
        (source / damaged).write_bytes(b"")
    data = TextImageDataModule(str(source), **{**COMMON, "batch_size": 2})
    list(data.train_dataloader())
    with caplog.at_level(logging.WARNING):
        data.teardown("fit")
    assert "train data: 1 item skipped: " in caplog.text
    [skip] = data.skipped()["train"]
    assert damaged in skip.name


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        assert batch["y"].device == batch["x"].device == self.device
        loss = (self.weight - batch["x"].mean((1, 2, 3)) - batch["y"].embeddings[:, 3].mean(1)).square().mean()
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch, batch_idx):
        assert set(batch) == {"x", "y", "names"}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, steps, folder=None, ckpt_path=None):
    model = Model()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    if folder is not None:
        trainer.save_checkpoint(folder / "stop.ckpt")
    return model.losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["latents", "folder", "tars"])
def test_an_interrupted_fit_has_the_losses_of_an_uninterrupted_one(kind, request, tmp_path):
    source = request.getfixturevalue(kind)

    def make():
        return TextImageDataModule(str(source), val=None if kind == "tars" else str(source), **COMMON)

    whole = fit(make(), 10)
    assert len(set(whole)) == 10
    assert fit(make(), 5, tmp_path) == whole[:5]
    assert fit(make(), 10, ckpt_path=tmp_path / "stop.ckpt") == whole[5:]


@pytest.mark.parametrize("kind", ["latents", "folder", "tars"])
def test_ranks_read_disjoint_halves_of_equal_length(kind, request):
    source = request.getfixturevalue(kind)

    class Rank:
        world_size = 2

        def __init__(self, rank):
            self.global_rank = rank

    seen = []
    for rank in range(2):
        data = TextImageDataModule(str(source), **{**COMMON, "batch_size": 3})
        data.trainer = Rank(rank)
        loader = data.train_dataloader()
        assert isinstance(loader, ResumableLoader)
        assert len(loader) == 2
        seen.append({image for batch in batches(data, loader) for image in images_of(batch["y"])})
    assert seen[0] | seen[1] == set(range(12))
    assert seen[0].isdisjoint(seen[1])


def test_real_photographs_with_five_captions(test_data):
    data = TextImageDataModule(
        str(test_data / "coco_mini" / "train2017"), **{**COMMON, "image_size": 64, "text_encoder": "words:8x24"}
    )
    batch = batches(data, data.train_dataloader())[0]
    assert batch["x"].shape == (4, 3, 64, 64)
    assert {len(captions) for captions in data.split("train").dataset.captions} == {5}


@pytest.mark.parametrize("caption_length", [None, 8])
def test_photographs_through_a_t5(caption_length, test_data, tmp_path, caplog):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32128, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    data = TextImageDataModule(
        str(test_data / "coco_mini" / "train2017"),
        image_size=32,
        batch_size=4,
        num_workers=0,
        text_encoder=str(tmp_path),
        tokenizer=str(test_data / "tokenizers" / "t5_xxl"),
        caption_length=caption_length,
    )
    batch = batches(data, data.train_dataloader())[0]
    assert batch["y"].embeddings.shape == (4, *data.caption_shape) == (4, caption_length or 120, 16)
    assert batch["y"].embeddings.dtype == data.null_captions.embeddings.dtype == torch.bfloat16
    assert bool(caption_length) == bool(data.skipped().get("captions")) == ("cut to 8 tokens" in caplog.text)


def test_every_argument_has_help():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(TextImageDataModule, "data")
    text = " ".join(parser.format_help().split())
    for words in ("side of the centre crop in pixels", "hub id of a T5", "mirror half of the training images"):
        assert words in text
    assert parser.get_defaults().data.flip is False
