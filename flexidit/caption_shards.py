"""Latents with embedded captions on disk: writing beside ``latent_encoding.py``, reading beside ``latent_shards.py``.

A shard of captioned latents holds, beside its latents (see ``latent_shards.py``)::

    captions (N,) int64            number of captions of each sample, an image or a clip
    caption_tokens (K,) int64      number of visible tokens of each caption, sample after sample
    embeddings (S, E)              the visible tokens of all captions, one after the other, in the encoder's dtype

and the folder holds ``null.safetensors``: ``embeddings`` (S, E) of the empty caption. The fingerprint has a field
``text_encoder``, which is also in the header of every shard, so that a shard of another encoder is recognised.

Shape legend: N samples of a shard, K captions of all of them, S visible tokens of all of these, L tokens that captions
are padded to, E width of the text encoder, Z h w as in ``latent_shards.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flexidit.captioned_images import CaptionedIndex
from flexidit.conditions import Captions
from flexidit.draws import Draw, draw_choice
from flexidit.files import write_atomically
from flexidit.fingerprints import fingerprint_differences
from flexidit.latent_encoding import (
    Codec,
    CompanionRows,
    EncodeResult,
    EncodeSettings,
    OnProgress,
    encode_with,
)
from flexidit.latent_shards import OnError, StoredLatents, hash_lines
from flexidit.skips import Skip
from flexidit.text import CaptionEncoder

NULL_FILE = "null.safetensors"
_FINGERPRINT = "text_encoder"


class EncodedCaptions:
    """Companions of captioned data: the captions of each image or clip through a text encoder."""

    def __init__(self, source: CaptionedIndex, encoder: CaptionEncoder) -> None:
        self.index, self.encoder = source, encoder

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The text encoder's."""
        return {_FINGERPRINT: self.encoder.fingerprint}

    @property
    def source(self) -> dict[str, Any]:
        """Names and captions, hashed."""
        lines = (json.dumps([item.file, *item.captions]) for item in self.index.items)
        return {"names_and_captions_sha256": hash_lines(lines)}

    @property
    def header(self) -> dict[str, str]:
        """The text encoder's fingerprint."""
        return {_FINGERPRINT: json.dumps(self.encoder.fingerprint)}

    def begin(self, out: Path) -> None:
        """Write the empty caption."""
        null = self.encoder.encode([""])
        write_atomically(out / NULL_FILE, save({"embeddings": null.embeddings[null.mask]}, self.header))

    def rows(self, positions: Sequence[int]) -> CompanionRows:
        """``captions`` (N,), ``caption_tokens`` (K,) and ``embeddings`` (S, E)."""
        items = [self.index.items[position] for position in positions]
        texts = [caption for item in items for caption in item.captions]
        encoded = self.encoder.encode(texts)
        tensors = {
            "captions": torch.tensor([len(item.captions) for item in items]),
            "caption_tokens": encoded.mask.sum(1),
            "embeddings": encoded.embeddings[encoded.mask],
        }
        owners = [(item.file, number) for item in items for number in range(len(item.captions))]
        cut = zip(owners, self.encoder.truncated(texts), strict=True)
        reason = f"cut to {self.encoder.max_length} tokens"
        truncated = [Skip(f"{file} caption {number}", reason) for (file, number), is_cut in cut if is_cut]
        return CompanionRows(tensors, [{"captions": list(item.captions)} for item in items], truncated)


def encode_captioned(
    source: CaptionedIndex,
    encoder: CaptionEncoder,
    codec: Codec,
    out: str | Path,
    settings: EncodeSettings,
    on_progress: OnProgress | None = None,
) -> EncodeResult:
    """Encode images or clips and their captions into shards, as :func:`flexidit.latent_encoding.encode_with` does.

    Raises:
        ValueError: if the folder holds latents made in another way, or every file is broken.
    """
    return encode_with(EncodedCaptions(source, encoder), source, codec, out, settings, on_progress)


class _CaptionTables(NamedTuple):
    """Where the captions of one shard begin."""

    first: Tensor
    """(N + 1,) number of the first caption of each sample, and that of all captions."""
    token: Tensor
    """(K + 1,) place of the first token of each caption, and the number of all tokens."""


class CaptionedLatents(StoredLatents):
    """Latents with embedded captions: ``dataset[Draw(sample, epoch)]`` is a pure function of its arguments.

    Of a sample's captions one is drawn in each epoch, keyed by (seed, epoch, position of its file in the source) as
    flips and noise are. Mirror images are off, other than for labels: a caption that says "left" is false of them.

    Args:
        root, expected, seed, flip, on_error: as in :class:`StoredLatents`; ``expected={"text_encoder": ...}`` compares
            text encoders. A shard that another encoder made is damaged.
        caption_length: L; None means the ``max_length`` of the encoder. Less is faster, if all captions fit.

    Raises:
        FileNotFoundError: if there are no latents.
        ValueError: in one sentence, if they do not fit the run or nothing can be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        expected: Mapping[str, Any] | None = None,
        seed: int = 0,
        flip: bool = False,
        on_error: OnError = "skip",
        caption_length: int | None = None,
    ) -> None:
        super().__init__(root, expected=expected, seed=seed, flip=flip, on_error=on_error)
        encoder = self.fingerprint[_FINGERPRINT]
        self.caption_length = int(encoder["max_length"] if caption_length is None else caption_length)
        if self.longest > self.caption_length:
            raise ValueError(f"captions in {root} have up to {self.longest} tokens: set caption_length to that or more")
        self.null_captions = self._padded([self._read_null()])

    @property
    def caption_shape(self) -> tuple[int, int]:
        """(L, E)."""
        return self.caption_length, int(self.fingerprint[_FINGERPRINT]["width"])

    @property
    def total_captions(self) -> int:
        """Captions of all samples."""
        return sum(len(tables.token) - 1 for tables in self._tables)

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return max(int(tables.token.diff().max()) for tables in self._tables)

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        """One sample: ``x`` (Z, h, w) float32, and ``y``, captions (1, L, E)."""
        draw = self._readable(Draw.of(key))
        return {"x": self._sample(draw), "y": self._padded([self._drawn(draw)])}

    def __getitems__(self, keys: Sequence[int | Draw]) -> dict[str, Any]:
        """A batch: ``x`` (N, Z, h, w) float32, ``y``, captions (N, L, E), and ``names``."""
        draws = [self._readable(Draw.of(key)) for key in keys]
        x = torch.stack([self._sample(draw) for draw in draws])
        return {"x": x, "y": self._padded([self._drawn(draw) for draw in draws]), "names": self._names(draws)}

    def captions(self, index: int) -> Captions:
        """All captions of one sample, in the order of the source: (its captions, L, E)."""
        return self._padded([self._caption(index, number) for number in range(self.num_captions(index))])

    def num_captions(self, index: int) -> int:
        """How many captions one sample has."""
        tables, row = self._place(index)
        return int(tables.first[row + 1] - tables.first[row])

    def _drawn(self, draw: Draw) -> Tensor:
        number = draw_choice(self.seed, self._source_draw(draw), self.num_captions(draw.sample))
        return self._caption(draw.sample, number)

    def _caption(self, index: int, number: int) -> Tensor:
        """(its tokens, E)."""
        tables, row = self._place(index)
        handle, _ = self._find(index)
        start, end = tables.token[int(tables.first[row]) + number :][:2].tolist()
        return handle.get_slice("embeddings")[start:end]

    def _padded(self, captions: Sequence[Tensor]) -> Captions:
        lengths = torch.tensor([len(caption) for caption in captions])
        embeddings = captions[0].new_zeros(len(captions), *self.caption_shape)
        for row, caption in enumerate(captions):
            embeddings[row, : len(caption)] = caption
        return Captions(embeddings, torch.arange(self.caption_length) < lengths[:, None])

    def _place(self, index: int) -> tuple[_CaptionTables, int]:
        shard, row = self._locate(index)
        return self._tables[shard], row

    def _check_kind(self) -> None:
        if _FINGERPRINT not in self.fingerprint:
            raise ValueError(
                f"the latents in {self.root} have no captions: encode them with `flexidit encode --captions`"
            )

    def _read_companions(self, handle: Any) -> _CaptionTables:
        self._check_encoder(handle.metadata())
        counts, tokens = handle.get_tensor("captions"), handle.get_tensor("caption_tokens")
        held = handle.get_slice("embeddings").get_shape()
        width = self.fingerprint[_FINGERPRINT]["width"]
        has_empty = bool((counts < 1).any() or (tokens < 1).any())
        if has_empty or int(counts.sum()) != len(tokens) or held != [int(tokens.sum()), width]:
            raise ValueError(f"its captions contradict one another: {held} embeddings for {int(tokens.sum())} tokens")
        return _CaptionTables(_starts(counts), _starts(tokens))

    def _check_encoder(self, header: Mapping[str, str] | None) -> None:
        made_by = json.loads((header or {}).get(_FINGERPRINT, "{}"))
        for name, (theirs, ours) in fingerprint_differences(made_by, self.fingerprint[_FINGERPRINT]).items():
            raise ValueError(f"made with {_FINGERPRINT}.{name} = {theirs!r}, the folder says {ours!r}")

    def _set_companions(self, tables: list[_CaptionTables]) -> None:
        self._tables = tables

    def _read_null(self) -> Tensor:
        try:
            return load_file(self.root / NULL_FILE)["embeddings"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"the embedding of the empty caption, {NULL_FILE} in {self.root}, cannot be read ({error}): run the "
                f"same `flexidit encode` again, which writes it anew"
            ) from error


def _starts(lengths: Tensor) -> Tensor:
    """Where each of several consecutive runs begins, and where the last ends: (n,) -> (n + 1,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
