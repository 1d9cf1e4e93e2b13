"""Fixtures of the package's own tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def save_word_tokenizer() -> Callable[..., None]:
    """Write a tokenizer of whole words, with T5's special tokens, to a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    def save(folder: Path, words: str = "a dog , running man on red bicycle") -> None:
        vocabulary = ["<pad>", "</s>", "<unk>", *words.split()]
        tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory, save_word_tokenizer: Callable[..., None]) -> Path:
    """Folder of a random T5 encoder of width 32 and a tokenizer of a few words, as in a pipeline; read only."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    save_word_tokenizer(folder / "tokenizer")
    return folder
