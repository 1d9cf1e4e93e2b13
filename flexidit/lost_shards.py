"""Shards that were there when a run began and are no longer, and what is read in their place."""

from collections.abc import Iterator, Sequence

import torch

from flexidit.draws import Draw, draw_choice


class LostShards:
    """Which shards a run does without, known to all its worker processes at once.

    A batch keeps its size, so that all ranks make equally many: a lost sample is replaced by another, drawn from what
    is left by the key of the one that is lost. Nothing piles up on the neighbours of a hole, and processes that know of
    the same losses read the same.

    Args:
        sizes: samples of each shard, in order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self._mask = torch.zeros(len(sizes), dtype=torch.bool).share_memory_()

    def add(self, shard: int) -> None:
        """Do without it from now on."""
        self._mask[shard] = True

    def __contains__(self, shard: int) -> bool:
        return bool(self._mask.numpy()[shard])

    def __iter__(self) -> Iterator[int]:
        return iter(self._mask.nonzero().flatten().tolist())

    def __len__(self) -> int:
        return int(self._mask.sum())

    def replacement(self, seed: int, draw: Draw) -> int:
        """Position of the sample that is read in the place of a lost one, which the draw is the key of.

        Raises:
            ValueError: if nothing is left.
        """
        lost = self._mask.tolist()
        kept = sum(size for size, is_lost in zip(self.sizes, lost, strict=True) if not is_lost)
        if not kept:
            raise ValueError("no shard of latents can be read any more: restore them, and go on with --ckpt_path last")
        place, start = draw_choice(seed, draw, kept), 0
        for size, is_lost in zip(self.sizes, lost, strict=True):
            if not is_lost and place < size:
                return start + place
            place -= 0 if is_lost else size
            start += size
        raise AssertionError("the sizes changed")
