"""Adapters without their base, and the folder of standard PEFT adapters that diffusers' users can load.

The folder has, for each weak patch size, a subfolder with ``adapter_config.json`` and ``adapter_model.safetensors``
in peft's format, for the modules of diffusers' class; ``embeddings.safetensors`` with what weak sizes have at both
ends of the token sequence; and ``flexidit.json``, which says how they go together. It is written last: a folder
without it was cut off.

Shape legend: D hidden size, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexidit.config import FlexConfig, TransformerConfig, config_from_dict, config_to_dict
from flexidit.identity import added_tensors, base_tensors, hash_tensors
from flexidit.layouts import Layout, layout_of_config
from flexidit.patch_size import PatchSize
from flexidit.weight_files import read_json, read_safetensors, save_json, save_safetensors

DESCRIPTION = "flexidit.json"
EMBEDDINGS = "embeddings.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_VERSION = 1
_FACTOR = re.compile(r"blocks\.(\d+)\.(.+)\.lora_([AB])\.([^.]+)\.weight")


@dataclass(frozen=True)
class BaseIdentity:
    """Which weights adapters stand on."""

    hash: str
    """See :func:`flexidit.identity.base_hash`."""
    source: str | None = None
    """Path or hub id from where the base was taken."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> BaseIdentity:
        """Of a checkpoint's plain values."""
        return cls(values["hash"], values.get("source"))


@dataclass(frozen=True)
class Adapters:
    """What the lora recipe added to a base, without the base."""

    config: TransformerConfig
    """Of the whole student."""
    tensors: dict[str, Tensor]
    """By the student's names."""
    base: BaseIdentity
    text: Mapping[str, Any] | None = None
    """Fingerprint of the text encoder that they were trained with; None: not known, or none."""

    @property
    def flex(self) -> FlexConfig:
        """The part of the config that describes what was added."""
        assert self.config.flex is not None
        return self.config.flex

    def to(self, dtype: torch.dtype | None) -> Adapters:
        """The same in another floating-point type; None: as it is."""
        if dtype is None:
            return self
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})


def adapters_of(
    config: TransformerConfig,
    state: Mapping[str, Tensor],
    base_source: str | None = None,
    text: Mapping[str, Any] | None = None,
) -> Adapters:
    """Part a student's state dict from its base.

    Raises:
        ValueError: the model has no adapters.
    """
    if config.flex is None or config.flex.recipe != "lora":
        kind = "plain" if config.flex is None else config.flex.recipe
        raise ValueError(f"this model is {kind} and has no adapters; only students of the lora recipe have some")
    digest = hash_tensors(base_tensors(state), computes_positions=config.computes_positions)
    return Adapters(config, added_tensors(state), BaseIdentity(digest, base_source), text)


def put_on_base(added: Adapters, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's state dict, of adapters and the state dict of their base.

    Both are widened where their floating-point types differ, as when weights in half precision were trained in single.
    """
    size, embedding = added.flex.weak_patch_sizes[0], added.config.embedding_name
    dtype = torch.promote_types(
        base[f"{embedding}.proj.weight"].dtype, added.tensors[f"{embedding}.per_size.{size.name}.weight"].dtype
    )
    layers = {name.split(".lora_A.")[0] for name in added.tensors if ".lora_A." in name}
    state = {**added.tensors, **{_student_name(name, layers): tensor for name, tensor in base.items()}}
    return {name: tensor.to(torch.promote_types(tensor.dtype, dtype)) for name, tensor in state.items()}


def save_peft(added: Adapters, folder: Path) -> Path:
    """Write the folder that this module's docstring describes.

    Raises:
        ValueError: a model that diffusers' class cannot express at its own patch size.
    """
    layout = layout_of_config(added.config)
    layout.config_to_diffusers(replace(added.config, flex=None))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    for size in added.flex.weak_patch_sizes:
        factors = _to_peft(added.tensors, size, layout)
        save_safetensors(factors, folder / size.name / ADAPTER, {"format": "pt"})
        save_json(_adapter_config(added), folder / size.name / ADAPTER_CONFIG)
    ends = {name: tensor for name, tensor in added.tensors.items() if not _FACTOR.fullmatch(name)}
    save_safetensors(ends, folder / EMBEDDINGS, {"format": "pt"})
    save_json(_description(added), folder / DESCRIPTION)
    return folder


def read_peft(folder: Path) -> Adapters:
    """Inverse of :func:`save_peft`.

    Raises:
        FileNotFoundError, ValueError: a part is missing, damaged, or not as :func:`save_peft` writes it.
    """
    values = read_json(folder / DESCRIPTION)
    try:
        version, base = values["version"], BaseIdentity.parse(values["base"])
        config = config_from_dict(values["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / DESCRIPTION} does not describe adapters ({error!r}); export them again") from None
    if version != _VERSION or config.flex is None:
        raise ValueError(f"{folder / DESCRIPTION} has version {version!r}, known is {_VERSION}; export the model again")
    tensors = _read_part(folder / EMBEDDINGS)
    for size in config.flex.weak_patch_sizes:
        tensors |= _from_peft(_read_part(folder / size.name / ADAPTER), size, config, folder / size.name)
    return Adapters(config, tensors, base, values.get("text"))


def check_not_a_part(folder: Path) -> None:
    """Refuse one of the adapters where the whole folder is meant.

    Raises:
        ValueError: this is a folder of peft's.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds one adapter, without the embeddings of its patch size; give the folder above it, which "
            f"has a {DESCRIPTION}"
        )


def _student_name(name: str, adapted: set[str]) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{layer}.base_layer.{kind}" if layer in adapted else name


def _to_peft(tensors: Mapping[str, Tensor], size: PatchSize, layout: Layout) -> dict[str, Tensor]:
    """One size's factors as peft names them, for the modules of diffusers."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match and match[4] == size.name:
            modules = layout.ADAPTED[match[2]]
            parts = tensor.chunk(len(modules)) if match[3] == "B" else [tensor] * len(modules)
            for module, part in zip(modules, parts, strict=True):
                out[_peft_name(layout, match[1], module, match[3])] = part.clone()
    return out


def _from_peft(
    theirs: Mapping[str, Tensor], size: PatchSize, config: TransformerConfig, folder: Path
) -> dict[str, Tensor]:
    """Inverse of :func:`_to_peft`."""
    out: dict[str, Tensor] = {}
    layout, blocks = layout_of_config(config), range(config.depth)
    expected = {_peft_name(layout, *parts) for parts in product(blocks, chain(*layout.ADAPTED.values()), "AB")}
    if set(theirs) != expected:
        name = sorted(set(theirs) ^ expected)[0]
        raise ValueError(f"{folder} has {name} where the model has none, or lacks it; export the model again")
    for i, (layer, modules), factor in product(blocks, layout.ADAPTED.items(), "AB"):
        parts = [theirs[_peft_name(layout, i, module, factor)] for module in modules]
        if factor == "A" and any(not torch.equal(part, parts[0]) for part in parts):
            raise ValueError(f"{folder} has unlike first factors for queries, keys and values; one adapter has one")
        out[f"blocks.{i}.{layer}.lora_{factor}.{size.name}.weight"] = torch.cat(parts) if factor == "B" else parts[0]
    return out


def _peft_name(layout: Layout, block: int | str, module: str, factor: str) -> str:
    return f"base_model.model.{layout.BLOCKS}.{block}.{module}.lora_{factor}.weight"


def _adapter_config(added: Adapters) -> dict[str, Any]:
    """peft's ``LoraConfig``: what it is not told has its default, which is plain LoRA."""
    adapted = layout_of_config(added.config).ADAPTED
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": added.base.source,
        "r": added.flex.rank,
        "lora_alpha": added.flex.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(module for modules in adapted.values() for module in modules),
    }


def _description(added: Adapters) -> dict[str, Any]:
    """What goes where, for our reader and for whoever puts the parts into diffusers' class by hand."""
    return {
        "version": _VERSION,
        "class": layout_of_config(added.config).CLASS_NAME,
        "base": asdict(added.base),
        "text": added.text,
        "rank": added.flex.rank,
        "alpha": added.flex.alpha,
        "placement": added.flex.positions,
        "sizes": {size.name: _size_description(added.config, size) for size in added.flex.weak_patch_sizes},
        "config": config_to_dict(added.config),
    }


def _size_description(config: TransformerConfig, size: PatchSize) -> dict[str, Any]:
    """The tensors of diffusers' class at this size, each the sum of those of ``embeddings.safetensors``."""
    layout = layout_of_config(config)
    embedding, final = (f"{end}.per_size.{size.name}" for end in (config.embedding_name, config.unembedding_name))
    return {
        "patch_size": list(size.as_tuple()),
        "adapter": f"{size.name}/{ADAPTER}",
        **layout.size_arguments(config.plain(size)),
        "tensors": {
            f"{layout.EMBEDDING}.weight": [f"{embedding}.weight"],
            f"{layout.EMBEDDING}.bias": [f"{embedding}.bias", f"size_embedder.{size.name}"],
            f"{layout.FINAL_LINEAR}.weight": [f"{final}.weight"],
            f"{layout.FINAL_LINEAR}.bias": [f"{final}.bias"],
        },
    }


def _read_part(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; export the model again")
    return read_safetensors(path)[0]
