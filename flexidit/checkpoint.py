"""Weights in and out: official, diffusers, flexidit and training checkpoints, exported adapters; paths and hub ids.

A flexidit checkpoint is one safetensors file whose header carries the model's config as json: one file cannot be half
of a pair. Where a file holds adapters only, it says which base they stand on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from flexidit.config import TransformerConfig, config_from_dict, config_to_dict
from flexidit.export import (
    DESCRIPTION,
    Adapters,
    BaseIdentity,
    adapters_of,
    check_not_a_part,
    put_on_base,
    read_peft,
)
from flexidit.identity import base_tensors, hash_tensors, unwrapped
from flexidit.layouts import Layout, layout_of_class, layout_of_config, layout_of_official
from flexidit.models import DiT, FlexiTransformer, TextDiT, Wan, plain_model
from flexidit.models.positioned import PositionedTransformer
from flexidit.recipes import flexify
from flexidit.sharded_files import is_sharded, read_sharded
from flexidit.weight_files import (
    DIFFUSERS_WEIGHTS,
    load_pickle,
    read_diffusers,
    read_json,
    read_safetensors,
    resolve,
    save_json,
    save_pickle,
    save_safetensors,
)

Format = Literal["flexidit", "official", "diffusers"]

_HEADER_KEY, _BASE_KEY, _TEXT_KEY = "flexidit", "flexidit_base", "flexidit_text"
_ALIGNMENT = 64  # bytes, of torch's own allocations
# How training scripts wrap what they save, the averaged weights and the others: PixArt's and DiT's
_WRAPPERS = {True: ("ema", "state_dict_ema"), False: ("model", "state_dict")}


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds: all that a model is built of."""

    config: TransformerConfig
    state: dict[str, Tensor]
    text: Mapping[str, Any] | None = None
    """Fingerprint of the text encoder that they were trained with; None: not known, or none."""


def load_checkpoint(
    path: str | Path, base: str | Path | None = None, *, prefer_ema: bool = True, **overrides: Any
) -> DiT | TextDiT | Wan:
    """A model with the weights and the config that a checkpoint holds, in eval mode, on the CPU.

    Args:
        path: a flexidit ``.safetensors``; a training ``.ckpt``, be it a file or a folder of shards; an official
            ``.pt``, ``.pth`` or ``.safetensors``, flat or wrapped as DiT's and PixArt's scripts do, or Wan's original
            directory; a diffusers directory, of the transformer or of its pipeline; a folder that ``flexidit convert
            --to peft`` wrote; or a hub id of a directory.
        base: what adapters stand on, in any of these forms; None takes it from where the checkpoint says it was.
        prefer_ema: take the averaged weights where a checkpoint has both.
        **overrides: for official weights, what no shape tells: ``num_heads``, a non-square ``input_size``; without
            PixArt's ``pos_embed``, and of a Wan, ``input_size``. For others they are not needed and not looked at.

    Raises:
        FileNotFoundError: neither a path nor a hub id that can be had, of the checkpoint or of its base.
        ValueError: a file that is damaged, unsafe, or not a model known here, or a base that is another than the
            adapters were trained on; the sentence names it.
    """
    weights = read_weights(path, base, prefer_ema=prefer_ema, **overrides)
    return build_from(weights, Path(path))


def save_checkpoint(
    model: FlexiTransformer,
    path: str | Path,
    *,
    layout_format: Format = "flexidit",
    adapters_only: bool = False,
    base_source: str | None = None,
    text: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model's weights so that a reader sees the whole file or none of it.

    Args:
        model: any model of ours; the other layouts take models with one patch size.
        path: a ``.safetensors`` file ("flexidit"), a ``.pt`` or ``.safetensors`` file ("official") or a directory
            ("diffusers").
        adapters_only: leave out the base of a student of the lora recipe, and write its hash instead.
        base_source: where readers find that base unless they are told otherwise: a path or a hub id.
        text: fingerprint of the text encoder that the model was trained with, which our own layout keeps.

    Returns:
        The file or directory that was written.
    """
    path = Path(path)
    if adapters_only:
        if layout_format != "flexidit":
            raise ValueError(f"the {layout_format} layout has no place for adapters; use layout_format='flexidit'")
        return save_adapters(adapters_of(model.config, model.state_dict(), base_source, text), path)
    if layout_format == "flexidit":
        return save_safetensors(model.state_dict(), path, _header(model.config, text))
    if model.config.flex is not None:
        raise ValueError(
            f"the {layout_format} layout has one patch size; take one of this model first "
            "(lora: merge a weak size, shared: pick any size)"
        )
    if layout_format == "official":
        state = layout_of_config(model.config).to_official(model.state_dict())
        is_safe = path.suffix == ".safetensors"
        return save_safetensors(state, path, {"format": "pt"}) if is_safe else save_pickle(state, path)
    return _save_diffusers(model, path)


def save_adapters(added: Adapters, path: Path) -> Path:
    """Write a flexidit ``.safetensors`` of what was added to a base, and of which base that is."""
    header = {**_header(added.config, added.text), _BASE_KEY: json.dumps(asdict(added.base))}
    return save_safetensors(added.tensors, path, header)


def build(config: TransformerConfig) -> FlexiTransformer:
    """A model, plain or flexible, with the structure that a config describes and fresh weights."""
    model = plain_model(replace(config, flex=None))
    if config.flex is None:
        return model
    flex = config.flex
    return flexify(
        model,
        flex.weak_patch_sizes,
        flex.recipe,
        underlying_patch_size=flex.underlying_patch_size,
        size_norms=flex.size_norms,
        positions=flex.positions,
        rank=flex.rank or 1,
        alpha=flex.alpha,
        keep_target=False,
    )


def build_from(weights: Weights, source: Path) -> Any:
    """Build on the meta device and put the tensors in place: nothing is initialised only to be overwritten.

    Raises:
        ValueError: tensors that do not fit the config; the sentence names ``source``.
    """
    with torch.device("meta"):
        model = build(weights.config)
    try:
        model.load_state_dict({name: _aligned(tensor) for name, tensor in weights.state.items()}, assign=True)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{source} does not fit the model it says it holds: {problem}") from None
    model.reset_derived()
    return model.eval()


def read_weights(
    path: str | Path, base: str | Path | None = None, *, prefer_ema: bool = True, **overrides: Any
) -> Weights:
    """As :func:`load_checkpoint`, without building the model."""
    return complete(read_any(path, prefer_ema=prefer_ema, **overrides), base, Path(path))


def recorded_text(path: str | Path) -> Mapping[str, Any] | None:
    """Fingerprint of the text encoder that a checkpoint of ours was trained with; None where that is not said.

    No base is looked for and no model built, so this is quick.
    """
    path = resolve(path)
    is_ours = (path / DESCRIPTION).is_file() or path.suffix in (".safetensors", ".ckpt")
    if not is_ours:
        return None
    try:
        return read_any(path).text
    except ValueError:  # official weights, which may need to be told more
        return None


def complete(found: Weights | Adapters, base: str | Path | None, path: Path) -> Weights:
    """What :func:`read_any` found at ``path``, adapters put on their base.

    Raises:
        FileNotFoundError, ValueError: a base that cannot be had, is another, or is given where none is needed.
    """
    if isinstance(found, Adapters):
        return Weights(found.config, put_on_base(found, base_of(found, base, path)), found.text)
    if base is not None:
        raise ValueError(f"{path} holds a whole model, which needs no base; leave {base} out")
    return found


def near(source: str | None, path: Path) -> str | None:
    """A recorded path, which may be relative to the folder of the training: looked for from the file's folders up too.

    Any file found so is compared by hash.
    """
    if source is None or Path(source).expanduser().exists():
        return source
    places = (folder / source for folder in path.resolve().parents)
    return next((str(place) for place in places if place.exists()), source)


def base_of(added: Adapters, given: str | Path | None, path: Path) -> dict[str, Tensor]:
    """The state dict of the base that was given, or of that which training had, if it is the same to the bit.

    Raises:
        FileNotFoundError, ValueError: it cannot be had, or is another; ``path`` is that of the adapters.
    """
    source = given or near(added.base.source, path)
    if source is None:
        raise ValueError(f"{path} holds adapters only and does not say where their base is; give it (base=, --base)")
    told = {name: getattr(added.config, name) for name in layout_of_config(added.config).UNTOLD_BY_SHAPES}
    try:
        base = base_tensors(read_weights(source, **told).state)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} holds adapters only, and their base cannot be had: {error} (base=, --base)"
        ) from None
    digest = hash_tensors(base, computes_positions=added.config.computes_positions)
    if digest != added.base.hash:
        raise ValueError(
            f"{source} is not the base that the adapters in {path} were trained on: its weights have the hash "
            f"{digest[:12]}, not {added.base.hash[:12]}; give that base (base=, --base)"
        )
    return base


def read_any(path: str | Path, *, prefer_ema: bool = True, **overrides: Any) -> Weights | Adapters:
    """What a checkpoint holds as it is: adapters stay without a base."""
    path = resolve(path)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(overrides.get("input_size"), int):
        overrides["input_size"] = (overrides["input_size"],) * 2
    if is_sharded(path):
        return _read_training(read_sharded(path), prefer_ema)
    if path.is_dir():
        return read_peft(path) if (path / DESCRIPTION).is_file() else _read_directory(path, overrides)
    if path.suffix == ".safetensors":
        state, header = read_safetensors(path)
        return _read_flexidit(state, header) if _HEADER_KEY in header else _read_official(state, path, overrides)
    values = load_pickle(path)
    if "state_dict" in values and "flexidit" in values:
        return _read_training(values, prefer_ema)
    return _read_official(_unwrap(values, prefer_ema), path, overrides)


def computed_positions(config: TransformerConfig) -> Tensor:
    """``pos_embed`` as a config says it, float32: (1, h * w, D). No weight is made, no random number drawn."""
    with torch.device("meta"):
        model = cast(PositionedTransformer, plain_model(replace(config, depth=0, flex=None)))
    model.pos_embed = nn.Parameter(torch.empty(0, device="cpu"), requires_grad=False)  # computed on its device
    return model.computed_positions(config.patch_size, config.input_size)


def _aligned(tensor: Tensor) -> Tensor:
    """In memory as torch allocates it.

    A view into a file may begin anywhere, and matrix products choose their order of summation by that: equal weights
    would give outputs that differ in the last bit.
    """
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _header(config: TransformerConfig, text: Mapping[str, Any] | None) -> dict[str, str]:
    header = {_HEADER_KEY: json.dumps(config_to_dict(config))}
    return header if text is None else {**header, _TEXT_KEY: json.dumps(dict(text))}


def _read_flexidit(state: dict[str, Tensor], header: Mapping[str, str]) -> Weights | Adapters:
    config = config_from_dict(json.loads(header[_HEADER_KEY]))
    text = json.loads(header[_TEXT_KEY]) if _TEXT_KEY in header else None
    if _BASE_KEY in header:
        return Adapters(config, state, BaseIdentity.parse(json.loads(header[_BASE_KEY])), text)
    return Weights(config, state, text)


def _read_training(values: Mapping[str, Any], prefer_ema: bool) -> Weights | Adapters:
    """A Lightning checkpoint: of the recipe "lora" it holds what trains, and the identity of the base."""
    state = _model_tensors(values["state_dict"])
    average = values.get("callbacks", {}).get("EMA", {}).get("average", {})
    if prefer_ema:
        state.update({name: tensor.to(state[name].dtype) for name, tensor in _model_tensors(average).items()})
    said = values["flexidit"]
    config, base, text = config_from_dict(said["config"]), said.get("base"), said.get("text")
    return Weights(config, state, text) if base is None else Adapters(config, state, BaseIdentity.parse(base), text)


def _model_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a Lightning module keeps under ``model.``, wrappers of compilation and checkpointing taken off."""
    bare = {unwrapped(name): value for name, value in tensors.items()}
    return {name.removeprefix("model."): value for name, value in bare.items() if name.startswith("model.")}


def _unwrap(values: Mapping[str, Any], prefer_ema: bool) -> dict[str, Tensor]:
    """The state dict that a training script wrapped, the averaged one or the other, or a flat one as it is."""
    for name in (*_WRAPPERS[prefer_ema], *_WRAPPERS[not prefer_ema]):
        if isinstance(values.get(name), Mapping):
            return dict(values[name])
    return dict(values)


def _read_official(state: dict[str, Tensor], path: Path, overrides: Mapping[str, Any]) -> Weights:
    layout = layout_of_official(state)
    try:
        config = layout.config_from_official(state, **overrides)
    except KeyError as error:
        raise ValueError(f"{path} has no {error}, which the weights that it seems to hold have") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Weights(config, _with_positions(config, layout.from_official(state)))


def _read_directory(path: Path, overrides: Mapping[str, Any]) -> Weights:
    check_not_a_part(path)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a directory that diffusers' save_pretrained wrote")
    values = read_json(config_file)
    try:
        layout = layout_of_class(values.get("_class_name"))
        if values["_class_name"] == layout.OFFICIAL_CLASS:
            return _read_official(read_diffusers(folder), folder, {**layout.told_by_official(values), **overrides})
        config = layout.config_from_diffusers(values)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{config_file}: {error}") from None
    return _read_diffusers(folder, layout, config, overrides)


def _read_diffusers(folder: Path, layout: Layout, config: Any, overrides: Mapping[str, Any]) -> Weights:
    config = replace(config, **{name: overrides[name] for name in layout.UNTOLD_BY_DIFFUSERS if name in overrides})
    try:
        state = layout.from_diffusers(read_diffusers(folder), config.depth)
    except KeyError as error:
        raise ValueError(f"the weights in {folder} have no {error}, which a {layout.CLASS_NAME} has") from None
    files = [folder / file for file in layout.BESIDE if (folder / file).is_file()]
    beside = {name: tensor for file in files for name, tensor in read_safetensors(file)[0].items()}
    config = layout.with_beside(config, beside)
    return Weights(config, _with_positions(config, {**state, **beside}))


def _with_positions(config: TransformerConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the table of positions, which layouts may leave out because it follows from the config."""
    if "pos_embed" in state or not config.has_position_table:
        return state
    return {**state, "pos_embed": computed_positions(config).to(state[f"{config.embedding_name}.proj.weight"].dtype)}


def _save_diffusers(model: FlexiTransformer, folder: Path) -> Path:
    layout, state = layout_of_config(model.config), model.state_dict()
    values = {"_class_name": layout.CLASS_NAME, **layout.config_to_diffusers(model.config)}
    if model.config.has_position_table:
        _check_positions(model)
    folder.mkdir(parents=True, exist_ok=True)
    for file, name in layout.BESIDE.items():
        (folder / file).unlink(missing_ok=True)
        if name in state:
            save_safetensors({name: state[name]}, folder / file, {"format": "pt"})
    converted = layout.to_diffusers(state, model.config.depth)
    save_safetensors(converted, folder / DIFFUSERS_WEIGHTS, {"format": "pt"})
    save_json(values, folder / "config.json")
    return folder


def _check_positions(model: FlexiTransformer) -> None:
    """diffusers computes positions from the indices of patches; any others would be lost without a word."""
    size, sides, layout = model.base_patch_size, model.input_size, layout_of_config(model.config)
    if sides[0] % size.h or sides[1] % size.w:
        raise ValueError(
            f"diffusers' DiT takes whole patches, not {size.name} on {sides[0]}x{sides[1]}; use --to official"
        )
    theirs = computed_positions(layout.config_from_diffusers(layout.config_to_diffusers(model.config)))
    if not torch.allclose(theirs, cast(Tensor, model.pos_embed).detach().float().cpu(), atol=1e-2):
        raise ValueError(
            f"diffusers puts patches at their index and this model has those of size {size.name} elsewhere "
            "(their centres, positions='coords'); use --to official, which stores positions, or flexify with "
            "positions='grid' or, of a PixArt, 'corners'"
        )
