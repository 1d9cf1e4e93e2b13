"""Map-style raw images or clips with their captions, as text: the text encoder comes after the batch.

Shape legend: N batch.
"""

import logging
from collections.abc import Sequence
from typing import Any

from datamodules.file_samples import FileSamples
from flexidit.captioned_images import CaptionedIndex
from flexidit.draws import Draw, draw_choice
from flexidit.latent_shards import OnError
from flexidit.sample_readers import SampleReader
from flexidit.skips import SkipReport

logger = logging.getLogger(__name__)


class CaptionedSamples(FileSamples):
    """Pixels and captions of a :class:`~flexidit.captioned_images.CaptionedIndex`; batches have ``texts``, N strings.

    Which of a file's captions is read is drawn anew in every epoch, keyed by (seed, epoch, file). A broken file is
    replaced by the next, together with its captions.

    Args:
        source: what to read.
        reader: what is read of a file.
        seed: key of the captions, the flips and what the reader draws.
        flip: mirror half of the draws; captions that say left or right are then wrong.
        on_error: replace and count broken files, or refuse the first.

    Raises:
        ValueError: if something was left out already, repeated captions aside, and ``on_error`` refuses that.
    """

    def __init__(
        self,
        source: CaptionedIndex,
        reader: SampleReader,
        *,
        seed: int = 0,
        flip: bool = False,
        on_error: OnError = "skip",
    ) -> None:
        faults = SkipReport([skip for skip in source.skips if skip.reason != "duplicate caption"])
        if on_error == "raise" and len(faults):
            raise ValueError(f"{source.root}: {faults.summary('item', 1)}: mend it, or set on_error to skip")
        if len(source.skips):
            logger.warning("%s: %s", source.root, source.skips.summary("item"))
        super().__init__(source.root, source.files, source.skips, reader, seed=seed, flip=flip, on_error=on_error)
        self.captions = [item.captions for item in source.items]

    def targets(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """``texts``: one caption a draw."""
        return {"texts": [self._caption(draw) for draw in draws]}

    def _caption(self, draw: Draw) -> str:
        captions = self.captions[draw.sample]
        return captions[draw_choice(self.seed, draw, len(captions))]
