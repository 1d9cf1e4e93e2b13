import json
import pickle

import pytest
import torch

from flexidit.text import TextEncoder, WordEncoder, clean_prompt, make_text_encoder, normalise_caption

TEXTS = ["A dog, Running", "", "a man on a red bicycle"]


def test_embeddings_equal_those_of_transformers_and_padding_is_hidden(t5):
    from transformers import AutoTokenizer, T5EncoderModel

    model = T5EncoderModel.from_pretrained(t5 / "text_encoder", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(t5 / "tokenizer")
    texts = [text.lower() for text in TEXTS]
    tokens = tokenizer(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    expected = model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    captions = TextEncoder(t5, dtype="float32", max_length=12, batch_size=2).encode(TEXTS)
    assert captions.mask.tolist() == tokens.attention_mask.bool().tolist()
    assert captions.mask.sum(1).tolist() == [5, 1, 7]
    torch.testing.assert_close(captions.embeddings[captions.mask], expected[captions.mask], atol=1e-5, rtol=1e-5)
    assert not captions.embeddings[~captions.mask].any()


def test_a_caption_does_not_depend_on_its_neighbours(t5):
    encoder = TextEncoder(t5, dtype="float32", max_length=12)
    alone = encoder.encode(TEXTS[:1])
    torch.testing.assert_close(encoder.encode(TEXTS).embeddings[:1], alone.embeddings, atol=1e-5, rtol=1e-5)


def test_results_have_the_dtype_and_stay_on_the_cpu(t5):
    encoder = TextEncoder(t5, max_length=9)
    assert encoder.encode(TEXTS).embeddings.dtype == torch.bfloat16
    assert encoder.encode([]).embeddings.shape == (0, 9, 32)
    assert (encoder.width, encoder.max_length) == (32, 9)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_case_and_outer_white_space_do_not_matter(t5):
    encoder = TextEncoder(t5)
    a, b = (encoder.encode([text]).embeddings for text in ("A Dog", "  a dog\n"))
    assert torch.equal(a, b)
    assert normalise_caption(" A\tDog ") == "a\tdog"


def test_overlong_captions_are_told_and_keep_their_end_token(t5):
    encoder = TextEncoder(t5, max_length=4, dtype="float32")
    texts = ["a dog running", "a man running on", ""]
    assert encoder.truncated(texts) == [False, True, False]
    assert encoder.truncated([]) == []
    assert encoder.encode(texts).mask.sum(1).tolist() == [4, 4, 1]
    cut = encoder.encode(["a man running"])
    torch.testing.assert_close(encoder.encode(texts[1:2]).embeddings, cut.embeddings)


def test_the_fingerprint_names_what_differs(t5, save_word_tokenizer, tmp_path):
    from transformers import T5EncoderModel

    first = TextEncoder(t5).fingerprint
    model = T5EncoderModel.from_pretrained(t5 / "text_encoder")
    model.encoder.final_layer_norm.weight.data[3] += 1
    model.save_pretrained(tmp_path / "other")
    save_word_tokenizer(tmp_path / "words", "a dog , running man on red tricycle")
    others = {
        "weights_sha256": TextEncoder(tmp_path / "other", tokenizer=t5),
        "tokenizer_sha256": TextEncoder(t5, tokenizer=tmp_path / "words"),
        "max_length": TextEncoder(t5, max_length=77),
    }
    for name, encoder in others.items():
        assert {key for key, value in encoder.fingerprint.items() if value != first[key]} == {name}
    assert TextEncoder(t5, dtype="float32").fingerprint["dtype"] == "float32"
    assert json.loads(json.dumps(first)) == first


def test_the_architecture_is_part_of_the_weights_identity(t5, tmp_path):
    from shutil import copytree

    copytree(t5, tmp_path / "other")
    path = tmp_path / "other" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"relative_attention_max_distance": 7}))
    assert (
        TextEncoder(tmp_path / "other").fingerprint["weights_sha256"] != TextEncoder(t5).fingerprint["weights_sha256"]
    )


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"max_length": 1}, {"batch_size": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="the text encoder's"):
        TextEncoder("any/where", **options)


def test_the_real_tokenizer_with_a_random_encoder(test_data, tmp_path):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32128, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(tmp_path)
    encoder = TextEncoder(tmp_path, tokenizer=test_data / "tokenizers" / "t5_xxl")
    captions = encoder.encode(["A dog, Running", "", "word " * 200])
    assert captions.embeddings.shape == (3, 120, 64)
    assert captions.mask.sum(1).tolist() == [6, 1, 120]
    assert encoder.truncated(["A dog, Running", "word " * 200]) == [False, True]


# UMT5

WAN_TEXTS = ["A dog,\n Running ", "", "a man &amp; a  dog", "a A " * 8]


def test_a_umt5_reads_prompts_as_wan_does(umt5):
    """Compared with diffusers' own pipeline, which fills captions up with zeros."""
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(umt5 / "text_encoder", dtype=torch.float32).eval()
    pipeline = WanPipeline(AutoTokenizer.from_pretrained(umt5 / "tokenizer"), model, None, None)
    expected, _ = pipeline.encode_prompt(WAN_TEXTS, do_classifier_free_guidance=False, max_sequence_length=12)
    captions = TextEncoder(umt5, dtype="float32", max_length=12, batch_size=2).encode(WAN_TEXTS)
    assert captions.mask.sum(1).tolist() == [5, 1, 6, 12]
    torch.testing.assert_close(captions.embeddings, expected, atol=1e-5, rtol=1e-5)


def test_what_is_done_to_captions_is_that_of_the_encoders_kind(t5, umt5):
    first, second = TextEncoder(t5), TextEncoder(umt5)
    assert (first.max_length, second.max_length) == (120, 512)
    assert (first.fingerprint["normalisation"], second.fingerprint["normalisation"]) == (
        "lower-strip",
        "html-whitespace",
    )
    assert second.fingerprint["class"] == "UMT5EncoderModel" and second.fingerprint["max_length"] == 512
    a, b = second.encode(["A dog", "a dog"]).embeddings
    assert not torch.equal(a, b)
    assert second.truncated(["a " * 511, "a " * 512]) == [False, True]
    assert clean_prompt("A&amp;lt;b\u00a0 c ") == "A<b c"


# WordEncoder


def test_words_are_the_same_on_every_machine():
    vectors = WordEncoder(width=8, max_length=4).encode(["seven"]).embeddings[0]
    expected = torch.tensor(
        [
            [-1.4, -0.2, -1.4, -1.4, -0.2, 0.2, -0.2, -1.4],
            [0.2, 1.4, -1.4, 0.2, -0.2, -0.2, 1.4, 1.4],
        ]
    )
    torch.testing.assert_close(vectors[:2], expected)
    assert not vectors[2:].any()


def test_words_have_unit_variance_and_are_nearly_orthogonal():
    encoder = WordEncoder(width=4096, max_length=8)
    a, b = (
        encoder.encode(["zero one two three four five", "six seven eight nine ten eleven"]).embeddings[:, :6].double()
    )
    vectors = torch.cat([a, b])
    assert torch.all((vectors.square().mean(1) - 1).abs() < 0.06)
    products = vectors @ vectors.T / 4096
    places = torch.eye(6, dtype=torch.bool).repeat(2, 2)  # equal places share a part of 0.36
    assert products[~places].abs().max() < 0.07
    assert (torch.diagonal(products, 6) - 0.36).abs().max() < 0.07


def test_words_see_the_order_and_not_the_case():
    encoder = WordEncoder()
    a, b, c = encoder.encode(["bold seven", "seven bold", " BOLD  Seven"]).embeddings
    assert not torch.equal(a, b)
    assert torch.equal(a, c)


def test_words_of_nothing_are_one_end_token():
    captions = WordEncoder().encode(["", " ", "seven"])
    assert captions.mask.sum(1).tolist() == [1, 1, 2]
    assert captions.embeddings[0, 0].any()
    assert not captions.embeddings[~captions.mask].any()


def test_words_that_do_not_fit_are_told():
    encoder = WordEncoder(max_length=4)
    assert encoder.truncated(["a b c", "a b c d"]) == [False, True]
    cut, whole = encoder.encode(["a b c d", "a b c"]).embeddings
    assert torch.equal(cut, whole)


def test_words_identify_themselves_and_travel():
    encoder = WordEncoder(width=16, seed=3)
    encoder.encode(["a"])
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.fingerprint == encoder.fingerprint != WordEncoder(width=16).fingerprint
    assert torch.equal(copy.encode(["a"]).embeddings, encoder.encode(["a"]).embeddings)
    assert not torch.equal(WordEncoder(width=16).encode(["a"]).embeddings, encoder.encode(["a"]).embeddings)


def test_names_choose_the_encoder(t5):
    assert make_text_encoder("words").fingerprint == WordEncoder().fingerprint
    assert make_text_encoder("words:32x8").fingerprint == WordEncoder(32, 8).fingerprint
    assert make_text_encoder("words:32", max_length=9).fingerprint == WordEncoder(32, 9).fingerprint
    encoder = make_text_encoder(t5, dtype="float32", max_length=7)
    assert isinstance(encoder, TextEncoder)
    assert (encoder.max_length, encoder.dtype) == (7, torch.float32)
    with pytest.raises(ValueError, match="width from 1"):
        make_text_encoder("words:0x8")
