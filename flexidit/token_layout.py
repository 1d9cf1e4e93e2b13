"""What one forward pass consists of: sequences of one or several patch sizes, and which tokens attend to which.

Data only, without torch: models run a layout, ``flops.py`` prices it, ``sampling/packing.py`` has those of the paper
(appendix B.2).

Vocabulary: a *segment* is a batch of sequences of one patch size. A *row* is what a call of attention takes for one
sequence; it may consist of several *blocks*, and a token attends within its own block only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flexidit.patch_size import PatchSize


@dataclass(frozen=True)
class Segment:
    """A batch of sequences of one patch size."""

    patch_size: PatchSize
    num_sequences: int
    num_tokens: int
    """Of one sequence."""


@dataclass(frozen=True)
class BlockWork:
    """What the blocks compute for one segment, padding counted."""

    num_sequences: int
    num_tokens: int
    """Of one sequence."""
    num_keys: int
    """That each query is multiplied with, masked or not."""


@dataclass(frozen=True)
class Rows:
    """Equal rows, which one call of attention computes."""

    segments: tuple[int, ...]
    """Indices of the segments that lie in these rows, side by side."""
    num_rows: int
    blocks: tuple[int, ...]
    """Number of tokens of each block of a row, from left to right; a single block needs no mask."""

    @property
    def num_tokens(self) -> int:
        """Of one row."""
        return sum(self.blocks)


@dataclass(frozen=True)
class TokenLayout:
    """A forward pass: linear layers see the tokens of all segments as one batch, attention sees them in rows."""

    segments: tuple[Segment, ...]
    """As they run: added sequences, and tokens added to each sequence, are counted."""
    rows: tuple[Rows, ...]
    """Each segment lies in the rows of one item."""

    def work(self, index: int) -> BlockWork:
        """What one segment costs in the blocks."""
        segment = self.segments[index]
        num_keys = next(rows.num_tokens for rows in self.rows if index in rows.segments)
        return BlockWork(segment.num_sequences, segment.num_tokens, num_keys)


Packing: TypeAlias = Callable[[Sequence[Segment]], TokenLayout]
"""Lays out segments, which it may extend by sequences or by tokens at their end; the model drops those again."""


def split_attention(segments: Sequence[Segment]) -> TokenLayout:
    """Linear layers over all tokens at once, then dense attention segment by segment: no padding and no mask.

    Example:
        >>> long, short = Segment(PatchSize.parse(2), 4, 256), Segment(PatchSize.parse(4), 4, 64)
        >>> split_attention([long, short]).rows
        (Rows(segments=(0,), num_rows=4, blocks=(256,)), Rows(segments=(1,), num_rows=4, blocks=(64,)))
    """
    rows = [Rows((i,), segment.num_sequences, (segment.num_tokens,)) for i, segment in enumerate(segments)]
    return TokenLayout(tuple(segments), tuple(rows))
