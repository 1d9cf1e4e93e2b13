import lightning as L
import pytest
import torch
from torch import nn

from datamodules.imagenet import ImageNetDataModule
from flexidit.images import find_images
from flexidit.latent_encoding import EncodeSettings, encode_images
from flexidit.latents import LatentCodec
from flexidit.sample_readers import ImageReader

COMMON = {"image_size": 16, "num_classes": 3, "batch_size": 4, "num_workers": 0}


@pytest.fixture
def latents(image_folder, kl_vae, tmp_path):
    settings = EncodeSettings(ImageReader(16), shard_size=5, dtype="float32")
    encode_images(find_images(image_folder), LatentCodec(kl_vae), tmp_path / "latents", settings)
    return tmp_path / "latents"


def batches(data, loader):
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def test_encoding_on_the_fly_equals_stored_latents(image_folder, latents, kl_vae):
    stored = ImageNetDataModule(str(latents), vae=str(kl_vae), seed=3, **COMMON)
    fly = ImageNetDataModule(str(image_folder), vae=str(kl_vae), seed=3, **COMMON)
    for _ in range(2):
        pairs = zip(batches(stored, stored.train_dataloader()), batches(fly, fly.train_dataloader()), strict=True)
        for a, b in pairs:
            assert a["y"].equal(b["y"])
            torch.testing.assert_close(a["x"], b["x"], atol=1e-5, rtol=1e-5)
    assert stored.sample_shape == fly.sample_shape == (4, 4, 4)
    assert stored.fingerprint == fly.fingerprint


def test_pixels_without_a_vae(image_folder):
    data = ImageNetDataModule(str(image_folder), **COMMON)
    batch = batches(data, data.train_dataloader())[0]
    assert set(batch) == {"x", "y", "names"}
    assert batch["x"].shape == (4, *data.sample_shape) == (4, 3, 16, 16)


def test_held_out_images_are_not_trained_on_and_never_change(latents):
    data = ImageNetDataModule(str(latents), val_fraction=0.25, **COMMON)
    loader = data.val_dataloader()
    first, second = ([batch["x"] for batch in loader] for _ in range(2))
    assert torch.cat(first).equal(torch.cat(second))
    assert sum(len(x) for x in first) == 3
    used = {draw.sample for draw in data.train_dataloader().sampler}
    assert used.isdisjoint(draw.sample for draw in loader.sampler)


def test_separate_validation_data(latents, image_folder, kl_vae):
    data = ImageNetDataModule(str(latents), val=str(image_folder), vae=str(kl_vae), **COMMON)
    assert sum(len(batch["y"]) for batch in batches(data, data.val_dataloader())) == 12
    assert ImageNetDataModule(str(latents), **COMMON).val_dataloader() == []


def test_latents_of_another_vae_or_size_are_refused(latents, tiny_vae):
    with pytest.raises(
        ValueError, match=r"codec\.class = 'AutoencoderKL', this run is configured for 'AutoencoderTiny'"
    ):
        ImageNetDataModule(str(latents), vae=str(tiny_vae), **COMMON).setup()
    with pytest.raises(ValueError, match="image_size = 16, this run is configured for 32"):
        ImageNetDataModule(str(latents), **{**COMMON, "image_size": 32}).setup()


def test_a_size_that_the_vae_does_not_divide_is_refused(image_folder, kl_vae):
    with pytest.raises(ValueError, match="18 is not divisible"):
        ImageNetDataModule(str(image_folder), vae=str(kl_vae), **{**COMMON, "image_size": 18}).setup()


def test_what_was_left_out_is_told(image_folder, latents, caplog):
    (image_folder / "n00000000" / "00.jpg").write_bytes(b"")
    data = ImageNetDataModule(str(image_folder), **COMMON)
    list(data.train_dataloader())
    data.teardown("fit")
    assert "train data: 1 item skipped: n00000000/00.jpg (zero bytes)" in caplog.text
    (latents / "shard-00000.safetensors").write_bytes(b"")
    data = ImageNetDataModule(str(latents), **COMMON)
    data.setup()
    assert len(data.skipped()["train"]) == 1
    with pytest.raises(ValueError, match="is damaged"):
        ImageNetDataModule(str(latents), on_error="raise", **COMMON).setup()


def write_tars(image_folder, folder):
    import webdataset as wds

    folder.mkdir()
    images = find_images(image_folder)
    for tar in range(2):
        with wds.TarWriter(str(folder / f"{tar}.tar")) as writer:
            for i in range(6 * tar, 6 * tar + 6):
                writer.write({"__key__": f"{i:02d}", "jpg": images.path(i).read_bytes(), "cls": images.labels[i]})


def test_tars_train_and_validate(image_folder, kl_vae, tmp_path):
    write_tars(image_folder, tmp_path / "tars")
    data = ImageNetDataModule(str(tmp_path / "tars"), val=str(tmp_path / "tars"), vae=str(kl_vae), **COMMON)
    train = batches(data, data.train_dataloader())
    assert [set(batch) for batch in train] == [{"x", "y", "names"}] * 3
    assert train[0]["x"].shape == (4, 4, 4, 4)
    assert sorted(label for batch in data.val_dataloader() for label in batch["y"].tolist()) == sorted([0, 1, 2] * 4)
    with pytest.raises(ValueError, match="cannot hold out"):
        ImageNetDataModule(str(tmp_path / "tars"), val_fraction=0.1, **COMMON).setup()


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = (self.weight - batch["x"].mean((1, 2, 3)) - batch["y"]).square().mean()
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
@pytest.mark.parametrize("kind", ["latents", "images", "tars"])
def test_an_interrupted_fit_has_the_losses_of_an_uninterrupted_one(kind, image_folder, latents, tmp_path):
    write_tars(image_folder, tmp_path / "tars")
    source = {"latents": latents, "images": image_folder, "tars": tmp_path / "tars"}[kind]

    def make():
        return ImageNetDataModule(str(source), val=None if kind == "tars" else str(source), **COMMON)

    whole = fit(make(), 10)
    assert fit(make(), 5, tmp_path) == whole[:5]
    assert fit(make(), 10, ckpt_path=tmp_path / "stop.ckpt") == whole[5:]


def delete_at_step_2(data, file, steps=8):
    """What a fit read in its last two steps: an epoch has three, and files are looked at before each batch."""
    read = []

    class Delete(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            read.append(batch["names"])
            if trainer.global_step == 2:
                file.unlink()

    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[Delete()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), data)
    assert len(read) == steps
    return [name for names in read[-2:] for name in names]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["latents", "tars", "images"])
def test_a_shard_deleted_under_a_running_fit_is_named_and_the_fit_goes_on(
    kind, num_workers, image_folder, latents, tmp_path, monkeypatch
):
    monkeypatch.setattr("datamodules.loading._SECONDS_BETWEEN_LOOKS", -1.0)
    write_tars(image_folder, tmp_path / "tars")
    source, name = {
        "latents": (latents, "shard-00001.safetensors"),
        "tars": (tmp_path / "tars", "1.tar"),
        "images": (image_folder, "n00000001/05.jpg"),
    }[kind]
    if kind == "tars":
        num_workers = min(num_workers, 1)
    data = ImageNetDataModule(str(source), **{**COMMON, "num_workers": num_workers})
    names = delete_at_step_2(data, source / name)
    assert not any(name in read for read in names)
    [skip] = data.skipped()["train"]
    assert skip.name.endswith(name)
    assert any(reason in skip.reason for reason in ("lost during the run", "No such file"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["latents", "tars", "images"])
def test_or_ends_in_one_sentence_by_choice(kind, image_folder, latents, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.loading._SECONDS_BETWEEN_LOOKS", -1.0)
    write_tars(image_folder, tmp_path / "tars")
    source, name = {
        "latents": (latents, "shard-00001.safetensors"),
        "tars": (tmp_path / "tars", "1.tar"),
        "images": (image_folder, "n00000001/05.jpg"),
    }[kind]
    data = ImageNetDataModule(str(source), on_error="raise", **{**COMMON, "num_workers": 1})
    with pytest.raises(ValueError, match=f"^[^\n]*{name}[^\n]*$"):
        delete_at_step_2(data, source / name)


def test_every_argument_has_help():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(ImageNetDataModule, "data")
    text = parser.format_help()
    assert "side of the centre crop in pixels" in text
    assert "null" not in parser.get_defaults().data.on_error
