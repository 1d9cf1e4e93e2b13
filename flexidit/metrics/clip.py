"""CLIP score of images and the texts that they were asked for (Hessel et al. 2021), through torchmetrics.

Shape legend: N images, H W height and width in pixels, L text tokens, D width of the common embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexidit.metrics.features import as_rgb, to_byte_levels
from flexidit.metrics.judges import Tally, texts_of
from flexidit.metrics.prompts import Wanted
from flexidit.text_loading import open_source

_FILES = ("config.json",)


class CLIPScore:
    """100 times the cosine of an image's and its text's embedding, as a judge of samples.

    A mean over all samples, negative cosines counted as they are; torchmetrics clips the mean at zero, which no set
    of samples ever reaches. The paper's figures take ViT-L/14, ``openai/clip-vit-large-patch14``.

    Texts longer than the text model's context (77 tokens of OpenAI's) lose their ends before the end token, which is
    where CLIP reads the text; torchmetrics alone would cut that token off too.

    Args:
        source: Folder or hub id of a CLIP in transformers' layout: weights, image processor and tokenizer.

    Raises:
        FileNotFoundError: a path holds no CLIP.
        ValueError: the weights cannot be had or cannot be used.
    """

    measures = ("clip_score",)

    def __init__(self, source: str | Path) -> None:
        model, processor = open_source(_read, source, "clip", _FILES, "CLIP")
        self.model = _Embedder(model)
        self._processor = processor
        self._preprocess = _Preprocessor(processor, model.config.text_config.max_position_embeddings)
        self._source = Path(source).name if Path(source).is_dir() else str(source)

    @property
    def description(self) -> str:
        """Which CLIP, with a digest of all that its scores depend on."""
        return f"CLIP score ({self._source} {self.fingerprint[:8]})"

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any weight, with the preparation of images, and with the tokenizer."""
        digest = hashlib.sha256(repr(sorted(self._processor.image_processor.to_dict().items())).encode())
        digest.update(repr(sorted(self._processor.tokenizer.get_vocab().items())).encode())
        for name, tensor in sorted(self.model.clip.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, pixels: Tensor, wanted: Wanted) -> Mapping[str, Tally]:
        """Sum of the scores of (N, 1 or 3, H, W) in [-1, 1] and N texts, which runs on the device of the pixels.

        Raises:
            ValueError: labels instead of texts, or another number of them.
        """
        texts = texts_of(wanted, len(pixels), "a CLIP score")
        metric = self._metric
        metric.reset()
        metric.to(pixels.device)
        metric.update(list(to_byte_levels(as_rgb(pixels)).to(torch.uint8)), list(texts))
        return {"clip_score": Tally(metric.score.item(), len(texts))}

    @cached_property
    def _metric(self) -> Any:
        from torchmetrics.multimodal import CLIPScore as Metric

        parts: Any = (self.model, self._preprocess)
        return Metric(lambda: parts, sync_on_compute=False)


class _Embedder(nn.Module):
    """A CLIP that returns its embeddings as plain tensors.

    transformers 5 wraps them in an output object, which torchmetrics 1.9 does not open.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip
        self.config = clip.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) as the processor makes them -> (N, D)."""
        return _tensor(self.clip.get_image_features(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N, L), (N, L) -> (N, D)."""
        return _tensor(self.clip.get_text_features(input_ids, attention_mask))


class _Preprocessor:
    """CLIP's processor, with texts cut to the length that the model takes, end token kept."""

    def __init__(self, processor: Any, max_length: int) -> None:
        self.processor, self.max_length = processor, max_length

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        """As torchmetrics calls it: images or texts."""
        if text is None:
            return self.processor(images=images, return_tensors=options["return_tensors"])
        return self.processor(text=text, truncation=True, max_length=self.max_length, **options)


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def _read(location: str, **options: Any) -> tuple[nn.Module, Any]:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    kind = CLIPConfig.get_config_dict(location, **options)[0].get("model_type")
    if kind != "clip":
        raise ValueError(f"its model_type is {kind!r}, not 'clip'")
    loaded: Any = CLIPModel.from_pretrained(location, weights_only=True, output_loading_info=True, **options)
    model, info = loaded
    if info["missing_keys"]:  # transformers would leave these at random values, with a warning only
        raise ValueError(f"its weights lack {len(info['missing_keys'])} tensors")
    processor = CLIPProcessor.from_pretrained(location, **options)
    # without vocabulary files transformers makes a tokenizer to which every word is the same, and says nothing
    if len(processor.tokenizer) < model.config.text_config.vocab_size:
        raise ValueError("its tokenizer has fewer tokens than its text model")
    return model.float().eval().requires_grad_(False), processor
