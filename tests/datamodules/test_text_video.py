import logging
import re

import lightning as L
import pytest
import torch
import webdataset as wds
from torch import nn

from datamodules.captioned_data import CaptionedDataModule
from datamodules.text_image import TextImageDataModule
from datamodules.text_video import TextVideoDataModule
from flexidit.caption_shards import encode_captioned
from flexidit.captioned_images import find_captioned_clips
from flexidit.clips import ClipSettings, read_clip
from flexidit.draws import Draw, draw_start
from flexidit.latent_encoding import EncodeSettings
from flexidit.latents import LatentCodec
from flexidit.sample_readers import ClipReader
from flexidit.text import make_text_encoder

WORDS = "words:8x6"
SETTINGS = ClipSettings(num_frames=9, size=(16, 24), fps=8.0)
COMMON = {"num_frames": 9, "size": (16, 24), "fps": 8.0, "batch_size": 2, "num_workers": 0, "text_encoder": WORDS}


@pytest.fixture
def latents(clip_folder, wan_vae, tmp_path):
    settings = EncodeSettings(ClipReader(SETTINGS), shard_size=4, dtype="float32", batch_size=2, flip=True)
    encoder, codec = make_text_encoder(WORDS), LatentCodec(wan_vae)
    encode_captioned(find_captioned_clips(clip_folder), encoder, codec, tmp_path / "latents", settings)
    return tmp_path / "latents"


def write_tars(folder, files, captions):
    folder.mkdir()
    for name, samples in files.items():
        with wds.TarWriter(str(folder / name)) as writer:
            for key, (suffix, data) in samples.items():
                writer.write({"__key__": key, suffix: data, **captions(key)})
    return folder


@pytest.fixture
def tars(clip_folder, tmp_path):
    """Two tars of three clips."""
    clips = {str(i): ("mp4", (clip_folder / f"{i}.mp4").read_bytes()) for i in range(6)}
    files = {f"{tar}.tar": {key: clips[key] for key in map(str, range(3 * tar, 3 * tar + 3))} for tar in range(2)}
    return write_tars(tmp_path / "tars", files, lambda key: {"json": {"captions": [f"clip {key} line 0"]}})


def batches(data, loader=None):
    return [data.on_after_batch_transfer(batch, 0) for batch in (data.train_dataloader() if loader is None else loader)]


def clips_of(y):
    """The numbers in the captions behind embeddings."""
    texts = [f"clip {clip} line {line}" for clip in range(6) for line in range(2)]
    known = make_text_encoder(WORDS).encode(texts).embeddings
    return [int(texts[int((known == row).flatten(1).all(1).nonzero())].split()[1]) for row in y.embeddings]


def test_encoding_on_the_fly_equals_what_is_stored(clip_folder, latents, wan_vae):
    options = {**COMMON, "vae": str(wan_vae), "seed": 3, "flip": True}
    stored = TextVideoDataModule(str(latents), **options)
    fly = TextVideoDataModule(str(clip_folder), draw_windows=False, **options)
    for _ in range(2):
        for a, b in zip(batches(stored), batches(fly), strict=True):
            assert a["y"].embeddings.equal(b["y"].embeddings)
            torch.testing.assert_close(a["x"], b["x"], atol=1e-5, rtol=1e-5)
    assert stored.fingerprint == fly.fingerprint
    assert stored.sample_shape == fly.sample_shape == (4, 3, 4, 6)
    assert stored.caption_shape == fly.caption_shape == (6, 8)


@pytest.mark.parametrize("kind", ["latents", "clip_folder", "tars"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_source_gives_captioned_clips(kind, num_workers, request):
    data = TextVideoDataModule(str(request.getfixturevalue(kind)), **{**COMMON, "num_workers": num_workers})
    read = batches(data)
    for batch in read:
        assert set(batch) == {"x", "y", "names"}
        assert batch["x"].shape == (2, *data.sample_shape)
        assert batch["x"].dtype == torch.float32
        assert batch["y"].embeddings.shape == (2, *data.caption_shape)
    assert len(read) == 3
    if kind != "tars" or not num_workers:  # readers of tars begin theirs again until the epoch's batches are full
        assert {clip for batch in read for clip in clips_of(batch["y"])} == set(range(6))
    assert not any(len(report) for report in data.skipped().values())


@pytest.mark.parametrize("kind", ["clip_folder", "tars"])
def test_clips_and_captions_stay_together(kind, clip_folder, request):
    data = TextVideoDataModule(str(request.getfixturevalue(kind)), draw_windows=False, **COMMON)
    for batch in batches(data):
        for pixels, clip in zip(batch["x"], clips_of(batch["y"]), strict=True):
            assert pixels.equal(read_clip(clip_folder / f"{clip}.mp4", SETTINGS))


def test_windows_are_drawn_by_epoch_for_training_and_stay_for_validation(clip_folder):
    data = TextVideoDataModule(str(clip_folder), val=str(clip_folder), seed=4, **COMMON)
    loader = data.train_dataloader()
    for epoch in range(2):
        for batch in loader:
            for pixels, clip in zip(batch["x"], batch["index"].tolist(), strict=True):
                start = draw_start(4, Draw(clip, epoch))
                assert pixels.equal(read_clip(clip_folder / f"{clip}.mp4", SETTINGS, start))
    shown = [pixels for batch in batches(data, data.val_dataloader()) for pixels in batch["x"]]
    for clip, pixels in enumerate(shown):
        assert pixels.equal(read_clip(clip_folder / f"{clip}.mp4", SETTINGS))


def test_a_folder_names_and_counts_what_is_broken_and_replaces_it(clip_kind, clip_kinds, clip_folder, caplog):
    name, reason = clip_kind
    (clip_folder / f"3{name}").write_bytes(clip_kinds[name])
    (clip_folder / f"3{name}").with_suffix(".txt").write_text("clip 3 line 0")
    data = TextVideoDataModule(str(clip_folder), **{**COMMON, "batch_size": 7})
    [batch] = data.train_dataloader()
    assert len(batch["x"]) == 7
    check_report(data, f"3{name}", reason, caplog)
    if reason is not None:
        assert sorted(batch["index"].tolist()) == [0, 1, 2, 3, 5, 5, 6]  # 4 is replaced by 5, its captions too


def test_a_tar_names_and_counts_what_is_broken(clip_kind, clip_kinds, clip_folder, tmp_path, caplog):
    name, reason = clip_kind
    clips = {str(i): ("mp4", (clip_folder / f"{i}.mp4").read_bytes()) for i in range(2)}
    stem, _, suffix = name.partition(".")
    files = {"0.tar": {**clips, stem: (suffix, clip_kinds[name])}}
    source = write_tars(tmp_path / "tars", files, lambda key: {"txt": "clip 0 line 0"})
    data = TextVideoDataModule(str(source), val=str(source), **COMMON)
    read = [sample for batch in batches(data, data.val_dataloader()) for sample in batch["x"]]
    assert len(read) == (3 if reason is None else 2)
    check_report(data, stem, reason, caplog, split="val")


def check_report(data, name, reason, caplog, split="train"):
    report = data.skipped()[split]
    if reason is None:
        assert not len(report)
        return
    [skip] = report
    assert name in skip.name
    assert re.search(reason, skip.reason)
    with caplog.at_level(logging.WARNING):
        data.teardown("fit")
    assert f"{split} data: 1 item skipped: " in caplog.text


def test_refusing_the_first_broken_clip_is_a_choice(clip_folder):
    (clip_folder / "3.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3\.mp4 cannot be read: zero bytes"):
        batches(TextVideoDataModule(str(clip_folder), on_error="raise", **COMMON))


def test_what_does_not_fit_the_run_is_refused(clip_folder, latents, wan_vae, cogvideox_vae):
    def refused(match, source, **options):
        with pytest.raises(ValueError, match=match):
            TextVideoDataModule(str(source), **{**COMMON, **options}).setup()

    other = r"codec\.class = 'AutoencoderKLWan', this run is configured for 'AutoencoderKLCogVideoX'"
    refused(other, latents, vae=str(cogvideox_vae))
    refused("num_frames = 9, this run is configured for 5", latents, num_frames=5)
    refused(r"fps = 8.0, this run is configured for 16", latents, fps=16.0)
    refused(r"size = \[16, 24\], this run is configured for \[24, 16\]", latents, size=(24, 16))
    refused("clips of 10 frames do not fit the VAE.*try 9", clip_folder, vae=str(wan_vae), num_frames=10)
    refused("18x24 is not divisible by the VAE's 4: try 16x24", clip_folder, vae=str(wan_vae), size=(18, 24))
    refused("need text_encoder", clip_folder, text_encoder=None)
    with pytest.raises(ValueError, match="for clips and not for images"):
        TextImageDataModule(str(clip_folder), vae=str(wan_vae), text_encoder=WORDS).setup()


@pytest.mark.parametrize("name", ["kl_vae", "tiny_vae"])
def test_a_vae_of_images_takes_the_frames_one_by_one(name, clip_folder, request):
    data = TextVideoDataModule(str(clip_folder), vae=str(request.getfixturevalue(name)), **COMMON)
    assert batches(data)[0]["x"].shape == (2, *data.sample_shape) == (2, 4, 9, 4, 6)


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = (self.weight - batch["x"].flatten(1).mean(1) - batch["y"].embeddings[:, 3].mean(1)).square().mean()
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, steps, folder=None, ckpt_path=None):
    model = Model()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    if folder is not None:
        trainer.save_checkpoint(folder / "stop.ckpt")
    return model.losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["latents", "clip_folder", "tars"])
def test_an_interrupted_fit_has_the_losses_of_an_uninterrupted_one(kind, request, wan_vae, tmp_path):
    source = request.getfixturevalue(kind)

    def make():
        return TextVideoDataModule(str(source), vae=str(wan_vae), **COMMON)

    whole = fit(make(), 8)
    assert len(set(whole)) == 8
    assert fit(make(), 5, tmp_path) == whole[:5]  # inside the second epoch
    assert fit(make(), 8, ckpt_path=tmp_path / "stop.ckpt") == whole[5:]


def test_real_clips(test_data):
    """Of the real files, those that are long enough; the animation lasts 2 seconds."""
    import json
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        lines = [{"file_name": path.name, "text": path.stem} for path in sorted((test_data / "videos").glob("*.m*"))]
        captions = Path(folder) / "captions.jsonl"
        captions.write_text("\n".join(map(json.dumps, lines)))
        options = {**COMMON, "size": (32, 48), "num_frames": 17, "batch_size": 3}
        data = TextVideoDataModule(str(test_data / "videos"), captions=str(captions), **options)
        read = batches(data)
    assert [batch["x"].shape for batch in read] == [(3, 3, 17, 32, 48)] * 2


def test_every_argument_has_help_and_a_size_is_two_numbers():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(TextVideoDataModule, "data")
    text = " ".join(parser.format_help().split())
    for words in ("height and width of the crop", "frames per second", "window of longer clips anew", "of a T5"):
        assert words in text
    parsed = parser.parse_args(["--data.train=x", "--data.size=[480, 832]", "--data.fps=null"]).data
    assert (parsed.size, parsed.fps, parsed.num_frames) == ((480, 832), None, 81)
    assert issubclass(TextVideoDataModule, CaptionedDataModule)
