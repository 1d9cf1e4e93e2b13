import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexidit.caption_shards import CaptionedLatents, encode_captioned
from flexidit.captioned_images import find_captioned_images
from flexidit.draws import Draw, draw_choice, draw_flip, draw_noise
from flexidit.images import find_images
from flexidit.latent_encoding import EncodeSettings, encode_images
from flexidit.latent_metadata import Metadata
from flexidit.latent_shards import LatentShards
from flexidit.latents import LatentCodec, PixelCodec
from flexidit.sample_readers import ImageReader
from flexidit.text import WordEncoder

SETTINGS = EncodeSettings(ImageReader(16), shard_size=5, batch_size=2, dtype="float32", flip=False)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


@pytest.fixture
def captioned(image_folder):
    """Twelve images, the n-th with n % 3 + 1 captions."""
    for number, path in enumerate(sorted(image_folder.rglob("*.jpg"))):
        texts = [f"view {NUMBERS[view]} of {NUMBERS[number]}" for view in range(number % 3 + 1)]
        path.with_suffix(".txt").write_text("\n".join(texts))
    return image_folder


def encode(folder, out, *, encoder=None, codec=None, settings=SETTINGS, **options):
    encoder, codec = encoder or WordEncoder(8, 6), codec or PixelCodec()
    return encode_captioned(find_captioned_images(folder), encoder, codec, out, settings, **options)


@pytest.fixture
def latents(captioned, tmp_path):
    """The twelve images as pixels in three shards."""
    encode(captioned, tmp_path / "latents")
    return tmp_path / "latents"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_captions_come_back_as_the_encoder_gave_them(captioned, latents):
    dataset, index = CaptionedLatents(latents), find_captioned_images(captioned)
    for number, item in enumerate(index.items):
        expected = WordEncoder(8, 6).encode(item.captions)
        found = dataset.captions(number)
        assert torch.equal(found.embeddings, expected.embeddings)
        assert torch.equal(found.mask, expected.mask)
    assert (dataset.total_captions, dataset.longest) == (24, 5)


def test_the_empty_caption_is_there(latents):
    null, expected = CaptionedLatents(latents).null_captions, WordEncoder(8, 6).encode([""])
    assert torch.equal(null.embeddings, expected.embeddings)
    assert torch.equal(null.mask, expected.mask)


def test_only_visible_tokens_are_stored(latents):
    shard = load_file(latents / "shard-00001.safetensors")
    assert set(shard) == {"mean", "index", "captions", "caption_tokens", "embeddings"}
    assert shard["captions"].tolist() == [3, 1, 2, 3, 1]
    assert shard["caption_tokens"].tolist() == [5] * 10
    assert shard["embeddings"].shape == (50, 8)


def test_names_and_texts_stand_beside_the_rows(latents):
    lines = (latents / "shard-00002.jsonl").read_text().splitlines()
    captions = ["view zero of ten", "view one of ten"]
    assert json.loads(lines[0]) == {"index": 10, "file": "n00000002/10.jpg", "captions": captions}


def test_the_caption_is_drawn_by_seed_epoch_and_place(latents):
    dataset = CaptionedLatents(latents, seed=3)
    for draw in (Draw(2), Draw(5, 2), Draw(11, 5)):
        every = dataset.captions(draw.sample)
        chosen = draw_choice(3, draw, len(every))
        y = dataset[draw]["y"]
        assert torch.equal(y.embeddings[0], every.embeddings[chosen])
        assert torch.equal(y.mask[0], every.mask[chosen])


def test_all_captions_have_their_epochs(latents):
    dataset = CaptionedLatents(latents)
    drawn = torch.cat([dataset[Draw(2, epoch)]["y"].embeddings for epoch in range(60)])
    assert {bytes(row.numpy()) for row in drawn} == {bytes(row.numpy()) for row in dataset.captions(2).embeddings}


def test_batches_equal_samples(latents):
    dataset = CaptionedLatents(latents)
    draws = [Draw(11, 1), Draw(0, 1), Draw(5, 1)]
    batch = dataset.__getitems__(draws)
    samples = [dataset[draw] for draw in draws]
    assert torch.equal(batch["x"], torch.stack([sample["x"] for sample in samples]))
    assert torch.equal(batch["y"].embeddings, torch.cat([sample["y"].embeddings for sample in samples]))
    assert torch.equal(batch["y"].mask, torch.cat([sample["y"].mask for sample in samples]))
    assert batch["y"].embeddings.shape == (3, *dataset.caption_shape)


def test_latents_are_those_of_the_image_and_flips_are_off(captioned, kl_vae, tmp_path):
    encode(captioned, tmp_path / "out", codec=LatentCodec(kl_vae))
    dataset = CaptionedLatents(tmp_path / "out", seed=3)
    mean, std = dataset.moments(7)
    torch.testing.assert_close(dataset[Draw(7, 2)]["x"], mean + std * draw_noise(3, Draw(7, 2), (4, 4, 4)))
    with pytest.raises(ValueError, match="have no mirror images"):
        CaptionedLatents(tmp_path / "out", flip=True)


def test_flips_where_they_are_asked_for(captioned, tmp_path):
    encode(captioned, tmp_path / "out", settings=EncodeSettings(ImageReader(16), dtype="float32"))
    dataset = CaptionedLatents(tmp_path / "out", flip=True)
    for epoch in range(4):
        mirrored = draw_flip(0, Draw(3, epoch))
        expected = dataset.moments(3)[0].flip(-1) if mirrored else dataset.moments(3)[0]
        torch.testing.assert_close(dataset[Draw(3, epoch)]["x"], expected)


def test_workers_read_through_their_own_maps(latents):
    dataset = CaptionedLatents(latents)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3]["y"].embeddings, dataset[3]["y"].embeddings)


def test_the_length_can_be_chosen_as_far_as_captions_fit(latents):
    short, long = CaptionedLatents(latents, caption_length=5), CaptionedLatents(latents, caption_length=20)
    assert (short.caption_shape, long.caption_shape) == ((5, 8), (20, 8))
    assert long[4]["y"].embeddings.shape == long.null_captions.embeddings.shape == (1, 20, 8)
    assert torch.equal(short[4]["y"].embeddings, long[4]["y"].embeddings[:, :5])
    with pytest.raises(ValueError, match="captions in .* have up to 5 tokens: set caption_length to that or more"):
        CaptionedLatents(latents, caption_length=4)


def test_half_precision_stays(captioned, tmp_path):
    class Half(WordEncoder):
        def encode(self, texts):
            captions = super().encode(texts)
            return type(captions)(captions.embeddings.bfloat16(), captions.mask)

    encode(captioned, tmp_path / "out", encoder=Half(8, 6))
    assert CaptionedLatents(tmp_path / "out")[0]["y"].embeddings.dtype == torch.bfloat16


# writing


def test_an_interrupted_run_continues_and_ends_with_the_same_files(captioned, latents, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(captioned, tmp_path / "out", on_progress=interrupt)
    result = encode(captioned, tmp_path / "out")
    assert (result.kept, result.encoded) == (5, 7)
    assert contents(tmp_path / "out") == contents(latents)


def test_overlong_captions_are_cut_and_named_again_by_a_later_run(captioned, tmp_path):
    (captioned / "n00000001" / "05.txt").write_text("short\n" + "very " * 9 + "long")
    for _ in range(2):
        result = encode(captioned, tmp_path / "out")
        assert [(skip.name, skip.reason) for skip in result.truncated] == [
            ("n00000001/05.jpg caption 1", "cut to 6 tokens")
        ]
    dataset = CaptionedLatents(tmp_path / "out")
    assert dataset.captions(5).mask.sum(1).tolist() == [2, 6]


def test_labelled_latents_have_no_field_for_captions(image_folder, tmp_path):
    encode_images(find_images(image_folder), PixelCodec(), tmp_path / "out", SETTINGS)
    content = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert all("truncated" not in entry for entry in content["shards"].values())
    assert "text_encoder" not in content["fingerprint"]


def test_other_captions_or_another_encoder_in_the_same_folder_are_refused(captioned, latents):
    with pytest.raises(ValueError, match=r"text_encoder\.seed = 0, this run is configured for 1"):
        encode(captioned, latents, encoder=WordEncoder(8, 6, seed=1))
    (captioned / "n00000001" / "05.txt").write_text("something else")
    with pytest.raises(ValueError, match="are of other files, labels or captions"):
        encode(captioned, latents)


# damage


def replace_with_shard_of(encoder):
    """A shard of the same images, and as many bytes, by another encoder."""

    def damage(latents, captioned):
        encode(captioned, latents.parent / "other", encoder=encoder)
        path = latents / "shard-00001.safetensors"
        path.write_bytes((latents.parent / "other" / path.name).read_bytes())
        metadata = Metadata.load(latents)
        metadata.shards["1"].bytes = path.stat().st_size
        metadata.save(latents)

    return damage


def alter(**changes):
    """Write other tables into a shard, in a file of the size that the metadata say."""

    def damage(latents, captioned):
        path = latents / "shard-00001.safetensors"
        header = {"text_encoder": json.dumps(Metadata.load(latents).fingerprint["text_encoder"])}
        save_file(load_file(path) | {name: torch.tensor(value) for name, value in changes.items()}, path, header)
        metadata = Metadata.load(latents)
        metadata.shards["1"].bytes = path.stat().st_size
        metadata.save(latents)

    return damage


def without_header(latents, captioned):
    path = latents / "shard-00001.safetensors"
    save_file(load_file(path), path)
    metadata = Metadata.load(latents)
    metadata.shards["1"].bytes = path.stat().st_size
    metadata.save(latents)


def first_shard(name):
    return lambda latents, captioned: {
        "cut": cut,
        "missing": lambda path: path.unlink(),
        "broken": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    }[name](latents / "shard-00001.safetensors")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (first_shard("cut"), "cut or altered"),
        (first_shard("missing"), "missing"),
        (first_shard("broken"), "unreadable"),
        (replace_with_shard_of(WordEncoder(8, 6, seed=1)), "made with text_encoder.seed = 1, the folder says 0"),
        (replace_with_shard_of(WordEncoder(9, 6)), "made with text_encoder.width = 9, the folder says 8"),
        (without_header, "made with text_encoder.class = None, the folder says 'WordEncoder'"),
        (alter(captions=[3, 1, 2, 3, 2]), "its captions contradict one another"),
        (alter(captions=[3, 1, 2, 4, 0]), "its captions contradict one another"),
        (alter(caption_tokens=[5] * 9 + [6]), "its captions contradict one another"),
    ],
)
def test_a_damaged_shard_is_named_and_changes_nothing_else(damage, reason, latents, captioned, caplog):
    whole = CaptionedLatents(latents)
    expected = whole[Draw(10, 4)]
    damage(latents, captioned)
    rest = CaptionedLatents(latents)
    assert (len(whole), len(rest)) == (12, 7)
    assert f"1 shard skipped: shard-00001.safetensors ({reason}" in rest.report.summary("shard")
    assert "1 shard skipped" in caplog.text
    found = rest[Draw(5, 4)]
    assert torch.equal(found["x"], expected["x"])
    assert torch.equal(found["y"].embeddings, expected["y"].embeddings)
    with pytest.raises(ValueError, match=r"shard shard-00001.safetensors of .* is damaged .*flexidit encode"):
        CaptionedLatents(latents, on_error="raise")


def test_a_cut_shard_is_encoded_again(captioned, latents):
    before = contents(latents)
    cut(latents / "shard-00001.safetensors")
    assert encode(captioned, latents).encoded == 5
    assert contents(latents) == before


@pytest.mark.parametrize("damage", [cut, lambda path: path.unlink(), lambda path: save_file({}, path)])
def test_a_damaged_empty_caption_is_refused_and_written_again(damage, captioned, latents):
    before = contents(latents)
    damage(latents / "null.safetensors")
    with pytest.raises(ValueError, match="the embedding of the empty caption, null.safetensors .* run the same"):
        CaptionedLatents(latents)
    encode(captioned, latents)
    assert contents(latents) == before


@pytest.mark.parametrize(
    "expected, message",
    [
        ({"image_size": 32}, "image_size = 16, this run is configured for 32"),
        ({"codec": {"class": "AutoencoderKL"}}, "codec.class = 'PixelCodec', this run"),
        ({"text_encoder": WordEncoder(8, 7).fingerprint}, "text_encoder.max_length = 6, this run is configured for 7"),
        ({"text_encoder": {"weights_sha256": "other"}}, "text_encoder.weights_sha256 = None"),
    ],
)
def test_a_wrong_fingerprint_is_refused_by_name(latents, expected, message):
    with pytest.raises(ValueError, match=message):
        CaptionedLatents(latents, expected=expected)
    assert len(CaptionedLatents(latents, expected={"text_encoder": WordEncoder(8, 6).fingerprint})) == 12


def test_labels_and_captions_are_not_confused(image_folder, latents, tmp_path):
    with pytest.raises(ValueError, match="have captions and no labels"):
        LatentShards(latents, flip=False)
    encode_images(find_images(image_folder), PixelCodec(), tmp_path / "labelled", SETTINGS)
    with pytest.raises(ValueError, match=r"have no captions: encode them with `flexidit encode --captions`"):
        CaptionedLatents(tmp_path / "labelled")
