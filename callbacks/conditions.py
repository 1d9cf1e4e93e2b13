"""What a run's pictures and metrics are asked for: its classes, captions of its data, or prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Trainer

from flexidit.conditions import Captions
from flexidit.metrics.prompts import CaptionTable, ClassLabels, Prompts


def conditions_of(
    trainer: Trainer, model: Any, count: int, prompts: Sequence[str] | None = None
) -> ClassLabels | Prompts:
    """For a model of classes, these in turn; for one of captions, prompts or else the first validation captions.

    With several processes, captions are those of each process's own share of the data. Where the model has no null
    caption, guidance points away from the data's.

    Args:
        trainer: its datamodule has the captions, and the text encoder for prompts.
        model: what is asked.
        count: how many captions of the data are of use.
        prompts: texts; None takes captions of the data.

    Raises:
        ValueError: the data have neither captions nor a text encoder, or the model takes classes.
    """
    num_classes = getattr(model.config, "num_classes", None)
    if num_classes is not None:
        if prompts is not None:
            raise ValueError("prompts are for models of captions, and this one takes classes: leave prompts out")
        return ClassLabels(num_classes)
    datamodule = getattr(trainer, "datamodule", None)
    negative = None if model.config.null_caption else getattr(datamodule, "null_captions", None)
    if prompts is not None:
        return Prompts(prompts, _encoder_of(datamodule).encode(list(prompts)), negative=negative)
    return _captions_of(datamodule, count, negative)


def _captions_of(datamodule: Any, count: int, negative: Captions | None) -> Prompts:
    texts: list[str] = []
    table = CaptionTable(_first_captions(datamodule, count, texts))
    return Prompts(texts or None, table, f"{type(datamodule).__name__} val", negative)


def _first_captions(datamodule: Any, count: int, texts: list[str]) -> Iterator[Captions]:
    """At least so many captions of validation batches, from a fresh loader; adds their texts where they are known."""
    found = 0
    for batch in datamodule.val_dataloader() if datamodule is not None else []:
        if "texts" in batch:
            texts += batch["texts"]
        yield _encoder_of(datamodule).encode(batch["texts"]) if "texts" in batch else batch["y"]
        found += len(batch["x"])
        if found >= count:
            return
    if not found:
        raise ValueError("there are no validation captions to sample for: give prompts, or a datamodule that has some")


def _encoder_of(datamodule: Any) -> Any:
    encoder = getattr(datamodule, "text_encoder", None)
    if encoder is None:
        raise ValueError("prompts need the text encoder: set data.text_encoder, or leave prompts out")
    return encoder
