"""Captions into embeddings: the one door to a text encoder.

Shape legend: N captions, L tokens they are padded to, E width of the embeddings. A text encoder is not an
``nn.Module``: held by whatever trains, it never becomes part of its parameters, its checkpoints or its sharding.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from flexidit.conditions import Captions, join
from flexidit.text_loading import EncoderKind, encoder_kind, load_t5, load_tokenizer

TextDtype = Literal["float32", "bfloat16"]
_ARCHITECTURE = (  # what changes the function of a T5 encoder beside its weights
    "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj", "layer_norm_epsilon",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
_PROBE = ("A dog, running.", "two  CATS\n& 3 birds", "caf\u00e9 \u2014 unk\u2603")
_WORDS_NAME = re.compile(r"words(?::(\d+)(?:x(\d+))?)?")


class CaptionEncoder(Protocol):
    """What turns captions into embeddings: :class:`TextEncoder` or :class:`WordEncoder`."""

    @property
    def width(self) -> int:
        """E."""

    @property
    def max_length(self) -> int:
        """L."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the embeddings: equal fingerprints mean interchangeable ones."""

    def encode(self, texts: Sequence[str]) -> Captions:
        """Embeddings (N, L, E) on the CPU, zero where hidden, with their mask (N, L)."""

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Which of the captions are too long for L tokens, and lose their ends in :meth:`encode`."""


def normalise_caption(text: str) -> str:
    """Lower case, without white space at the ends: PixArt's handling when it is not asked to clean captions.

    PixArt's cleaning (HTML entities, links, camera file names, ...) is for captions scraped from the web; captions
    that need it are better cleaned once, where they are stored.
    """
    return text.lower().strip()


def clean_prompt(text: str) -> str:
    """HTML entities read, white space collapsed, upper and lower case kept: Wan's handling.

    Wan's code, and diffusers where ftfy is installed, also repair wrongly decoded text; captions that need it are
    better repaired once, where they are stored.

    Example:
        >>> clean_prompt(" A cat &amp;amp;\\n  a Dog ")
        'A cat & a Dog'
    """
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


class _Handling(NamedTuple):
    """What models trained with one kind of encoder expect of captions."""

    name: str
    """In fingerprints."""
    normalise: Callable[[str], str]
    max_length: int


_HANDLING: dict[EncoderKind, _Handling] = {
    "t5": _Handling("lower-strip", normalise_caption, 120),
    "umt5": _Handling("html-whitespace", clean_prompt, 512),
}


class TextEncoder:
    """The encoder of a T5 or UMT5, frozen, with its tokenizer.

    Both are read at the first use. Captions are normalised as the models of the encoder's kind expect: by
    :func:`normalise_caption` for T5 (PixArt), by :func:`clean_prompt` for UMT5 (Wan). Longer ones are cut to
    ``max_length`` tokens, the end-of-text token included, which is also what the empty caption consists of.

    Args:
        source: folder or hub id of a T5 or UMT5 (its decoder, if there, is not read), or of a pipeline with a
            ``text_encoder`` and a ``tokenizer`` folder, such as PixArt's and Wan's.
        tokenizer: folder or hub id of the tokenizer; None takes that of ``source``.
        device: where the encoder runs; results are on the CPU.
        dtype: of weights and results. float16 is not offered: T5's activations overflow in it.
        max_length: L; None takes 120 for T5, as PixArt-alpha was trained, and 512 for UMT5, as Wan.
        batch_size: captions that go through at once, which bounds memory; a GPU wants more than the default.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        tokenizer: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: TextDtype = "bfloat16",
        max_length: int | None = None,
        batch_size: int = 8,
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"the text encoder's dtype is bfloat16 or float32, got {dtype!r}")
        if batch_size < 1:
            raise ValueError(f"the text encoder's batch_size is at least 1, got {batch_size}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"the text encoder's max_length is at least 2, one word and the end, got {max_length}")
        self.source = source
        self.tokenizer_source = source if tokenizer is None else tokenizer
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.batch_size = batch_size
        self._max_length = max_length

    @cached_property
    def _handling(self) -> _Handling:
        return _HANDLING[encoder_kind(self.source)]

    @property
    def max_length(self) -> int:
        """L."""
        return self._handling.max_length if self._max_length is None else self._max_length

    @cached_property
    def model(self) -> nn.Module:
        """The frozen encoder of transformers."""
        return load_t5(self.source, self.dtype).to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return load_tokenizer(self.tokenizer_source)

    @property
    def width(self) -> int:
        """E."""
        return int(self.model.config.d_model)  # type: ignore[union-attr, arg-type]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the embeddings.

        Weights are hashed as they run, with the numbers that decide what they do; the tokenizer by its vocabulary and
        by what it makes of a few texts. Folders, file formats and versions of libraries do not matter.
        """
        return {
            "class": type(self.model).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "width": self.width,
            "normalisation": self._handling.name,
            "tokenizer_sha256": _tokenizer_sha256(self.tokenizer, self._handling.normalise),
            "weights_sha256": _weights_sha256(self.model),
        }

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the encoder; returns itself."""
        self.device = torch.device(device)
        if "model" in self.__dict__:
            self.model.to(self.device)
        return self

    def release(self) -> None:
        """Free the weights, some 10 GB for T5-XXL in bfloat16; they are read again when they are needed."""
        self.__dict__.pop("model", None)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Captions:
        """Embeddings (N, L, E) in the encoder's dtype on the CPU, zero where hidden, with their mask (N, L)."""
        chunks = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        if not chunks:
            return _no_captions(self.max_length, self.width, self.dtype)
        return join([self._encode_chunk(chunk) for chunk in chunks])

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Which of the captions have more than L tokens, the end-of-text token included."""
        if not texts:
            return []
        whole = self.tokenizer([self._handling.normalise(text) for text in texts], verbose=False)
        return [len(tokens) > self.max_length for tokens in whole["input_ids"]]

    def _encode_chunk(self, texts: Sequence[str]) -> Captions:
        # padded to the longest of the chunk only: captions are far shorter than L, and the mask hides the rest
        tokens = self.tokenizer(
            [self._handling.normalise(text) for text in texts],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask.bool()
        return Captions(hidden.masked_fill(~mask[..., None], 0).cpu(), mask.cpu()).padded(self.max_length)


class WordEncoder:
    """A stand-in for demonstrations and tests: every word has its own fixed random vector, nothing is learned.

    Words that mean the same are as far apart as any two, so a model trained on it knows exactly the words that it saw.
    What it has in common with a real encoder: the interface, masks, an end token (all that the empty caption
    has), and that the order of words is visible, through a fixed vector for each place.

    A word, lower-cased, and a place give vectors of +1 and -1 out of a hash (SHAKE-256 of seed and word), so that all
    machines agree. The embedding is 0.8 of the word's plus 0.6 of the place's: variance 1.

    Args:
        width: E.
        max_length: L, the end token included.
        seed: of the vectors.
    """

    _WORD = re.compile(r"\w+|[^\w\s]")
    _END = "</end>"  # no text contains it as one word

    def __init__(self, width: int = 64, max_length: int = 16, seed: int = 0) -> None:
        if width < 1 or max_length < 2:
            raise ValueError(f"WordEncoder takes a width from 1 and a max_length from 2, got {width} and {max_length}")
        self.width, self.max_length, self.seed = width, max_length, seed
        self.dtype = torch.float32
        self._vector = lru_cache(maxsize=1 << 16)(self._signs)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the embeddings."""
        return {"class": "WordEncoder", "max_length": self.max_length, "width": self.width, "seed": self.seed}

    def to(self, device: torch.device | str) -> WordEncoder:
        """Nothing to move; for symmetry with :class:`TextEncoder`."""
        return self

    def encode(self, texts: Sequence[str]) -> Captions:
        """Embeddings (N, L, E) float32, zero where hidden, with their mask (N, L)."""
        captions = _no_captions(self.max_length, self.width, self.dtype, len(texts))
        for row, text in enumerate(texts):
            words = [*self._words(text)[: self.max_length - 1], self._END]
            vectors = [0.8 * self._vector(word) + 0.6 * self._vector(f"<{place}>") for place, word in enumerate(words)]
            captions.embeddings[row, : len(words)] = torch.stack(vectors)
            captions.mask[row, : len(words)] = True
        return captions

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Which of the captions have more than L - 1 words."""
        return [len(self._words(text)) >= self.max_length for text in texts]

    def _words(self, text: str) -> list[str]:
        return self._WORD.findall(normalise_caption(text))

    def _signs(self, key: str) -> Tensor:
        """(E,) of +1 and -1."""
        digest = hashlib.shake_256(f"{self.seed}:{key}".encode()).digest(-(-self.width // 8))
        bits = [byte >> bit & 1 for byte in digest for bit in range(8)]
        return torch.tensor(bits[: self.width], dtype=self.dtype) * 2 - 1

    def __reduce__(self) -> tuple[type[WordEncoder], tuple[int, int, int]]:
        return WordEncoder, (self.width, self.max_length, self.seed)  # a cache does not travel to workers


def make_text_encoder(
    name: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: TextDtype = "bfloat16",
    max_length: int | None = None,
    batch_size: int = 8,
) -> TextEncoder | WordEncoder:
    """The encoder of a name.

    Args:
        name: ``"words"``, ``"words:WIDTH"`` or ``"words:WIDTHxLENGTH"`` for a :class:`WordEncoder`; else folder or hub
            id of a :class:`TextEncoder`.
        tokenizer: of a :class:`TextEncoder`, where it is not beside the encoder.
        device: of a :class:`TextEncoder`.
        dtype: of a :class:`TextEncoder`.
        max_length: L; None means 120, of UMT5 512, and 16 words.
        batch_size: of a :class:`TextEncoder`.

    Example:
        >>> make_text_encoder("words:32x8").encode(["a bold seven"]).mask.sum().item()
        4
    """
    words = _WORDS_NAME.fullmatch(str(name))
    if words:
        width, length = int(words[1] or 64), int(words[2] or 16)
        return WordEncoder(width, length if max_length is None else max_length)
    return TextEncoder(
        name, tokenizer=tokenizer, device=device, dtype=dtype, max_length=max_length, batch_size=batch_size
    )


def _no_captions(length: int, width: int, dtype: torch.dtype, count: int = 0) -> Captions:
    """Captions of zeros without a visible token, to be filled."""
    return Captions(torch.zeros(count, length, width, dtype=dtype), torch.zeros(count, length, dtype=torch.bool))


def _tokenizer_sha256(tokenizer: Any, normalise: Callable[[str], str]) -> str:
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "probe": [tokenizer(normalise(text)).input_ids for text in _PROBE],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _weights_sha256(model: nn.Module) -> str:
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    digest = hashlib.sha256(json.dumps({name: config.get(name) for name in _ARCHITECTURE}).encode())
    for name, tensor in sorted(model.named_parameters()):  # tied tensors once
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
