"""What samples are asked for: classes or captions in turn, as the model is told and as a judge reads it.

Shape legend: N prompts, n samples, L caption tokens, E width of the text encoder, M visible tokens of all prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flexidit.conditions import Captions

if TYPE_CHECKING:
    from flexidit.text import CaptionEncoder

Wanted: TypeAlias = "Tensor | Sequence[str]"
"""What a judge compares samples with: class labels (n,), or n texts."""

_CHUNK = 256


class Conditions(Protocol):
    """What the i-th sample of an evaluation is asked for, whichever rank and batch it falls into."""

    @property
    def description(self) -> str:
        """For the record: samples under equal descriptions compare. Empty for classes in turn."""

    @property
    def negative(self) -> Tensor | Captions | None:
        """One condition (1, ...) in place of the model's null condition; None: the model's own."""

    def told(self, indices: Tensor) -> Tensor | Captions:
        """What the model is told for these samples (n,): n conditions."""

    def wanted(self, indices: Tensor) -> Wanted:
        """The same for a judge."""


class ClassLabels:
    """Class i mod K for the i-th sample: all classes equally often, up to one.

    Example:
        >>> ClassLabels(3).told(torch.arange(5))
        tensor([0, 1, 2, 0, 1])
    """

    description = ""
    negative = None

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def told(self, indices: Tensor) -> Tensor:
        """Labels (n,)."""
        return indices % self.num_classes

    def wanted(self, indices: Tensor) -> Tensor:
        """Labels (n,)."""
        return self.told(indices)


class CaptionTable:
    """Captions without their padding, in one flat table of visible tokens.

    30,000 captions of COCO in the embedding of T5-XXL are some 4 GB so; padded to 120 tokens they would be 30 GB.

    Args:
        parts: Captions in chunks, which need not exist at the same time.

    Raises:
        ValueError: no captions.
    """

    def __init__(self, parts: Iterable[Captions]) -> None:
        kept = [(part.embeddings[part.mask], part.mask, part.image_size) for part in parts]
        if not sum(len(mask) for _, mask, _ in kept):
            raise ValueError("there are no prompts: give one at least")
        tokens, masks, sizes = zip(*kept, strict=True)
        length = max(mask.shape[1] for mask in masks)
        self._tokens = torch.cat(tokens)  # (M, E)
        self._mask = torch.cat([F.pad(mask, (0, length - mask.shape[1])) for mask in masks])  # (N, L)
        counts = self._mask.sum(dim=1)
        self._starts = counts.cumsum(dim=0) - counts  # (N,)
        self._image_size = None if any(size is None for size in sizes) else torch.cat(sizes)

    def __len__(self) -> int:
        return len(self._mask)

    def __getitem__(self, rows: Tensor) -> Captions:
        """The captions of these rows (n,), all padded to L."""
        mask = self._mask[rows]
        embeddings = self._tokens.new_zeros(*mask.shape, self._tokens.shape[1])
        place = self._starts[rows, None] + mask.cumsum(dim=1) - 1  # (n, L), of visible tokens
        embeddings[mask] = self._tokens[place[mask]]
        return Captions(embeddings, mask, None if self._image_size is None else self._image_size[rows])

    def digest(self) -> str:
        """Changes with any visible token."""
        content = self._tokens.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content + self._mask.numpy().tobytes()).hexdigest()


class Prompts:
    """Prompt i mod N for the i-th sample: the prompts in turn, from the start again where samples are more.

    Args:
        texts: The N prompts; None where only embeddings are known, so that no judge can read them.
        captions: Their embeddings.
        name: Where they come from, for the record.
        negative: One caption that guidance points away from; None: the model's null caption.

    Raises:
        ValueError: no prompts, unequal numbers of texts and captions, or more than one negative caption.

    Example:
        >>> from flexidit.text import WordEncoder
        >>> prompts = Prompts.encode(["a cat", "two big dogs"], WordEncoder(width=4, max_length=5))
        >>> prompts.wanted(torch.arange(3)), prompts.told(torch.arange(3)).mask.sum(1).tolist()
        (['a cat', 'two big dogs', 'a cat'], [3, 4, 3])
    """

    def __init__(
        self,
        texts: Sequence[str] | None,
        captions: Captions | CaptionTable,
        name: str = "prompts",
        negative: Captions | None = None,
    ) -> None:
        self.captions = CaptionTable([captions]) if isinstance(captions, Captions) else captions
        if texts is not None and len(texts) != len(self.captions):
            raise ValueError(
                f"every prompt needs its embedding, got {len(texts)} texts and {len(self.captions)} captions"
            )
        if negative is not None and len(negative) != 1:
            raise ValueError(f"there is one negative caption for all prompts, or none; got {len(negative)}")
        self.texts = None if texts is None else list(texts)
        self.name, self.negative = name, negative

    @classmethod
    def encode(
        cls,
        texts: Sequence[str],
        encoder: CaptionEncoder,
        name: str = "prompts",
        negative: str | None = None,
        on_chunk: Callable[[int], None] = lambda count: None,
    ) -> Prompts:
        """The prompts, embedded some hundred at a time.

        Args:
            texts: The N prompts.
            encoder: The one that the model was trained with.
            name: Where they come from, for the record.
            negative: What guidance points away from; None: the model's null caption.
            on_chunk: Called with the number of prompts that have been embedded since the last call.
        """

        def parts() -> Iterator[Captions]:
            for start in range(0, len(texts), _CHUNK):
                chunk = texts[start : start + _CHUNK]
                yield encoder.encode(chunk)
                on_chunk(len(chunk))

        table = CaptionTable(parts())
        if negative is None:
            return cls(texts, table, name)
        return cls(texts, table, f"{name}, guided away from {negative!r}", encoder.encode([negative]))

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def description(self) -> str:
        """Where the prompts come from, how many there are, and a digest of them."""
        content = json.dumps(self.texts).encode() if self.texts is not None else self.captions.digest().encode()
        return f"{self.name} ({len(self)} prompts, {hashlib.sha256(content).hexdigest()[:8]})"

    def told(self, indices: Tensor) -> Captions:
        """Embeddings (n, L, E) with their mask (n, L)."""
        return self.captions[indices % len(self)]

    def wanted(self, indices: Tensor) -> list[str]:
        """The n texts.

        Raises:
            ValueError: only embeddings are known.
        """
        if self.texts is None:
            raise ValueError(f"of {self.name} only the embeddings are known: no judge can read them")
        return [self.texts[index] for index in (indices % len(self)).tolist()]


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line, UTF-8; empty lines are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not text, or holds no prompt.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompts at {path}: give a text file with one prompt a line")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; prompts are a text file with one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def read_coco_prompts(path: str | Path) -> list[str]:
    """Captions of a COCO annotation file, the first of every image, then the second of every image, and so on.

    The first N prompts so speak of N different images as far as there are as many. Images are in the order in which
    the annotations first name them; they need not be there. Annotations without a caption are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, or holds no caption.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no captions at {path}: give COCO's annotations, such as captions_val2014.json")
    try:
        annotations = json.loads(Path(path).read_bytes())["annotations"]
        pairs = [(entry["image_id"], entry["caption"]) for entry in annotations if _has_caption(entry)]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not COCO's annotation of captions: it needs a list named annotations") from None
    if not pairs:
        raise ValueError(f"{path} holds no caption")
    return _in_rounds(pairs)


def _has_caption(entry: object) -> bool:
    caption = entry.get("caption") if isinstance(entry, dict) else None
    return isinstance(caption, str) and bool(caption.strip())


def _in_rounds(pairs: Sequence[tuple[object, str]]) -> list[str]:
    """First captions of each image, then second ones, ..."""
    order: dict[object, int] = {}
    seen: Counter[object] = Counter()
    ranked = []
    for image, caption in pairs:
        ranked.append((seen[image], order.setdefault(image, len(order)), caption.strip()))
        seen[image] += 1
    return [caption for _, _, caption in sorted(ranked)]
