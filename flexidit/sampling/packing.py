"""How the two predictions of a guided step, of unequal length, become forward passes (paper, appendix B.2, Fig. 12).

All ways give the same predictions; they differ in what is computed in vain and in how well it suits the hardware.
For 4 images with a conditional sequence of 256 tokens and a guiding one of 64 each:

* ``separate`` (approach 2): a pass of 4 x 256 and one of 4 x 64 tokens. The fewest FLOPs; all weights are read twice.
* ``padded`` (approach 1): one pass of 8 x 256, in which 4 x 192 tokens are padding.
* ``rows`` (approach 3): one pass of 4 x (256 + 64), masked attention.
* ``groups`` (approach 4): one pass of (4 + 1) x 256, as many short sequences in a row as one long sequence has room
  for; masked attention in such rows. The last row is filled up: a single image costs as much as four.
* ``split``: one pass of 4 x 256 and 4 x 64, joined in linear layers, dense attention for each length. Not in the
  paper: FLOPs of ``separate``, and weights read once.

The drawing is lost in the text of the paper; its labels ("Image 1 C", "Image 1 UC", "Padding") and its caption leave
this reading. A mask over the rows that hold one sequence only would change nothing, and they go without.

Data only: a model with ``can_pack`` runs these layouts, ``flops.trace_cost`` prices them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, get_args

from flexidit.patch_size import PatchSize
from flexidit.token_layout import Packing, Rows, Segment, TokenLayout, split_attention

if TYPE_CHECKING:
    from torch import Tensor

    from flexidit.conditions import Condition

PackingName: TypeAlias = Literal["separate", "padded", "rows", "groups", "split"]


class PackingDenoiser(Protocol):
    """A model that makes several batches of predictions in one pass."""

    can_pack: bool

    def __call__(
        self,
        x: Sequence[Tensor],
        t: Sequence[Tensor],
        y: Sequence[Condition],
        *,
        patch_size: Sequence[PatchSize],
        packing: Packing,
    ) -> Sequence[Tensor]:
        """Batch by batch, (N, C, H, W), (N,), N conditions -> (N, C or 2C, H, W), each at its own patch size."""


def pad_to_longest(segments: Sequence[Segment]) -> TokenLayout:
    """Every sequence in a row of the longest one's length, the rest of it padding.

    Example:
        >>> pad_to_longest(_example()).rows
        (Rows(segments=(0,), num_rows=5, blocks=(256,)), Rows(segments=(1,), num_rows=5, blocks=(64, 192)))
    """
    longest = _longest(segments)
    padded = [Segment(segment.patch_size, segment.num_sequences, longest) for segment in segments]
    rows = [Rows((i,), s.num_sequences, _blocks(s.num_tokens, longest)) for i, s in enumerate(segments)]
    return TokenLayout(tuple(padded), tuple(rows))


def pack_rows(segments: Sequence[Segment]) -> TokenLayout:
    """All sequences of one image side by side in a row.

    Raises:
        ValueError: segments with unequal numbers of sequences.

    Example:
        >>> pack_rows(_example()).rows
        (Rows(segments=(0, 1), num_rows=5, blocks=(256, 64)),)
    """
    counts = {segment.num_sequences for segment in segments}
    if len(counts) != 1:
        raise ValueError(f"rows take one sequence of each size, but there are {sorted(counts)}; pack groups instead")
    blocks = tuple(segment.num_tokens for segment in segments)
    return TokenLayout(tuple(segments), (Rows(tuple(range(len(segments))), counts.pop(), blocks),))


def pack_groups(segments: Sequence[Segment]) -> TokenLayout:
    """As many sequences of one size in a row as the longest sequence has room for, the last row filled up.

    Example:
        >>> pack_groups(_example()).rows
        (Rows(segments=(0,), num_rows=5, blocks=(256,)), Rows(segments=(1,), num_rows=2, blocks=(64, 64, 64, 64)))
    """
    filled, rows = [], []
    for i, segment in enumerate(segments):
        in_a_row = _longest(segments) // segment.num_tokens
        num_rows = -(-segment.num_sequences // in_a_row)
        filled.append(Segment(segment.patch_size, num_rows * in_a_row, segment.num_tokens))
        rows.append(Rows((i,), num_rows, (segment.num_tokens,) * in_a_row))
    return TokenLayout(tuple(filled), tuple(rows))


PACKINGS: Final[Mapping[str, Packing]] = MappingProxyType(
    {"padded": pad_to_longest, "rows": pack_rows, "groups": pack_groups, "split": split_attention}
)
"""What a model takes as ``packing``, by name; ``"separate"`` is not among them, because it is two calls."""


def packing_of(name: PackingName) -> Packing | None:
    """The layout of that name; ``None`` for ``"separate"``.

    Raises:
        ValueError: an unknown name.
    """
    known = get_args(PackingName)
    if name not in known:
        raise ValueError(f"unknown packing {name!r}: give one of {', '.join(known)}")
    return PACKINGS.get(name)


def _longest(segments: Sequence[Segment]) -> int:
    return max(segment.num_tokens for segment in segments)


def _blocks(num_tokens: int, row_length: int) -> tuple[int, ...]:
    """The padding is a block as well: it attends to itself, so that no query is left without any key."""
    return (num_tokens,) if num_tokens == row_length else (num_tokens, row_length - num_tokens)


def _example() -> list[Segment]:
    """Five images, for the examples above."""
    return [Segment(PatchSize.parse(2), 5, 256), Segment(PatchSize.parse(4), 5, 64)]
