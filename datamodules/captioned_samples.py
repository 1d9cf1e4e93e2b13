"""Map-style raw images with their captions, as text: the text encoder comes after the batch.

Shape legend: N batch, S side of the square crop.
"""

import logging
from collections.abc import Sequence
from typing import Any

from datamodules.image_samples import FileSamples
from flexidit.captioned_images import CaptionedIndex
from flexidit.draws import Draw, draw_choice
from flexidit.latent_shards import OnError
from flexidit.skips import SkipReport

logger = logging.getLogger(__name__)


class CaptionedSamples(FileSamples):
    """Pixels and captions of a :class:`~flexidit.captioned_images.CaptionedIndex`; batches have ``texts``, N strings.

    Which of an image's captions is read is drawn anew in every epoch, keyed by (seed, epoch, image). A broken image
    is replaced by the next, together with its captions.

    Args:
        images: what to read.
        size: S.
        seed: key of the captions and the flips.
        flip: mirror half of the draws; captions that say left or right are then wrong.
        on_error: replace and count broken images, or refuse the first.

    Raises:
        ValueError: if something was left out already, repeated captions aside, and ``on_error`` refuses that.
    """

    def __init__(
        self,
        images: CaptionedIndex,
        size: int,
        *,
        seed: int = 0,
        flip: bool = False,
        on_error: OnError = "skip",
    ) -> None:
        faults = SkipReport([skip for skip in images.skips if skip.reason != "duplicate caption"])
        if on_error == "raise" and len(faults):
            raise ValueError(f"{images.root}: {faults.summary('item', 1)}: mend it, or set on_error to skip")
        if len(images.skips):
            logger.warning("%s: %s", images.root, images.skips.summary("item"))
        files = [item.file for item in images.items]
        super().__init__(images.root, files, images.skips, size, seed=seed, flip=flip, on_error=on_error)
        self.captions = [item.captions for item in images.items]

    def targets(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """``texts``: one caption a draw."""
        return {"texts": [self._caption(draw) for draw in draws]}

    def _caption(self, draw: Draw) -> str:
        captions = self.captions[draw.sample]
        return captions[draw_choice(self.seed, draw, len(captions))]
