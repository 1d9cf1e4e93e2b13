import json
import pickle

import pytest
import torch

from flexidit.draws import Draw, draw_flip, draw_noise
from flexidit.fingerprints import check_fingerprint
from flexidit.images import find_images
from flexidit.latent_encoding import EncodeSettings, encode_images
from flexidit.latent_metadata import Metadata
from flexidit.latent_shards import LatentShards
from flexidit.latents import LatentCodec
from flexidit.sample_readers import ImageReader


@pytest.fixture
def latents(image_folder, kl_vae, tmp_path):
    """Twelve encoded images in three shards."""
    settings = EncodeSettings(ImageReader(16), shard_size=5, dtype="float32")
    encode_images(find_images(image_folder), LatentCodec(kl_vae), tmp_path / "latents", settings)
    return tmp_path / "latents"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_sample_is_mean_plus_std_times_keyed_noise(latents):
    dataset = LatentShards(latents, seed=3)
    for draw in (Draw(0), Draw(7, 2), Draw(11, 5)):
        mean, std = dataset.moments(draw.sample, flipped=draw_flip(3, draw))
        expected = mean + std * draw_noise(3, draw, (4, 4, 4))
        torch.testing.assert_close(dataset[draw]["x"], expected, rtol=0, atol=0)


def test_each_epoch_resamples_and_is_reproducible(latents):
    first, again = LatentShards(latents), LatentShards(latents)
    assert torch.equal(first[Draw(4, 1)]["x"], again[Draw(4, 1)]["x"])
    assert not torch.equal(first[Draw(4, 1)]["x"], first[Draw(4, 2)]["x"])


def test_batches_equal_samples(latents):
    dataset = LatentShards(latents)
    draws = [Draw(11, 1), Draw(0, 1), Draw(5, 1)]
    batch = dataset.__getitems__(draws)
    assert torch.equal(batch["x"], torch.stack([dataset[draw]["x"] for draw in draws]))
    assert batch["y"].tolist() == [2, 0, 1]


def test_workers_read_through_their_own_maps(latents):
    dataset = LatentShards(latents)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3]["x"], dataset[3]["x"])


def test_a_deterministic_vae_stores_no_deviation(image_folder, tiny_vae, tmp_path):
    settings = EncodeSettings(ImageReader(16), dtype="float32")
    encode_images(find_images(image_folder), LatentCodec(tiny_vae), tmp_path / "latents", settings)
    dataset = LatentShards(tmp_path / "latents", flip=False)
    assert dataset.moments(0)[1] is None
    assert torch.equal(dataset[Draw(2, 0)]["x"], dataset[Draw(2, 9)]["x"])


def test_a_cut_shard_is_named_and_counted_and_changes_nothing_else(latents, caplog):
    whole = LatentShards(latents)
    cut(latents / "shard-00001.safetensors")
    rest = LatentShards(latents)
    assert (len(whole), len(rest)) == (12, 7)
    assert "shard-00001.safetensors (cut or altered" in rest.report.summary("shard")
    assert "1 shard skipped" in caplog.text
    assert torch.equal(whole[Draw(10, 4)]["x"], rest[Draw(5, 4)]["x"])


def test_a_shard_with_a_broken_header_of_the_right_size_is_skipped(latents):
    path = latents / "shard-00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert [skip.name for skip in LatentShards(latents).report] == [path.name]


def test_damage_is_refused_by_choice(latents):
    cut(latents / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=r"shard shard-00001.safetensors of .* is damaged .*flexidit encode"):
        LatentShards(latents, on_error="raise")
    for path in latents.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="no shard in"):
        LatentShards(latents)


@pytest.mark.parametrize(
    "expected, message",
    [
        ({"image_size": 32}, "image_size = 16, this run is configured for 32"),
        ({"codec": {"scaling_factor": 0.18215}}, r"codec.scaling_factor = 0.5, this run is configured for 0.18215"),
        ({"codec": {"weights_sha256": "other"}}, "codec.weights_sha256"),
        ({"codec": {"class": "AutoencoderTiny"}}, "codec.class = 'AutoencoderKL'"),
    ],
)
def test_a_wrong_fingerprint_is_refused_by_name(latents, expected, message):
    with pytest.raises(ValueError, match=message):
        LatentShards(latents, expected=expected)


def test_equal_fingerprints_pass(latents, kl_vae):
    assert len(LatentShards(latents, expected={"codec": LatentCodec(kl_vae).fingerprint, "image_size": 16})) == 12


def test_a_field_that_the_latents_lack_differs():
    with pytest.raises(ValueError, match="crop = None"):
        check_fingerprint({}, {"crop": "adm_center"}, "here")


def test_an_interrupted_encoding_is_used_or_refused_by_choice(latents, caplog):
    metadata = Metadata.load(latents)
    metadata.complete = False
    metadata.save(latents)
    LatentShards(latents)
    assert "was interrupted" in caplog.text
    with pytest.raises(ValueError, match="was interrupted"):
        LatentShards(latents, on_error="raise")


def test_other_folders_and_formats_are_refused(latents, tmp_path):
    with pytest.raises(FileNotFoundError, match="flexidit encode"):
        LatentShards(tmp_path / "absent")
    for content in ("{", "[]", json.dumps({"format": "other"})):
        (latents / "metadata.json").write_text(content)
        with pytest.raises(ValueError, match="encode again"):
            LatentShards(latents)


def test_labels_beyond_the_model_are_refused(latents):
    with pytest.raises(ValueError, match="have class 2, the model has 2 classes"):
        LatentShards(latents, num_classes=2)


def test_statistics_are_those_of_what_is_drawn(latents):
    dataset = LatentShards(latents, flip=False)
    drawn = torch.stack([dataset[Draw(i, epoch)]["x"] for i in range(12) for epoch in range(60)]).double()
    statistics = dataset.metadata.statistics()
    mean, std = torch.tensor(statistics["mean"]).double(), torch.tensor(statistics["std"]).double()
    torch.testing.assert_close(drawn.mean((0, 2, 3)), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std((0, 2, 3)), std, atol=0.02, rtol=0)


def test_unscaled_latents_are_warned_about(latents, caplog):
    metadata = Metadata.load(latents)
    for entry in metadata.shards.values():
        entry.channel_std = [5.5] * 4
    metadata.save(latents)
    LatentShards(latents)
    assert "wrong scaling?" in caplog.text
