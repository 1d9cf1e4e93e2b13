"""Training checkpoints that every process of a job wrote its part of: folders of torch's distributed checkpoint.

A folder has ``__RANK_N.distcp`` files, one after another the zips of ``torch.save`` of each shard; ``.metadata``, a
pickle that says which shard lies where; ``meta.pt``, what is not sharded; and ``complete.json``, written last: the
names and sizes of all the others. torch reads ``.metadata`` with pickle, which runs what it is told to. Nothing here
does: only the names that torch itself writes into it are accepted.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from flexidit.weight_files import load_pickle, read_json, save_json
from flexidit.zip_records import bytes_of, in_threads, problem_of

METADATA, EXTRA, COMPLETE = ".metadata", "meta.pt", "complete.json"
REST = "rest"
"""Of sharded tensors that are neither weights nor an optimizer's, such as averages; inside, they lie as in the file."""
_WEIGHTS, _OPTIMIZER, _REST = "state_dict.", "optimizer_", f"{REST}."

_ALLOWED = {
    "torch": {"Size", "strided"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "pathlib": {"Path", "PurePosixPath", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Knows what torch writes into ``.metadata`` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def is_sharded(path: Path) -> bool:
    """Whether this is such a folder, whole or not."""
    return path.is_dir() and any((path / name).exists() for name in (METADATA, EXTRA, COMPLETE))


def mark_complete(folder: Path) -> None:
    """Write down what a folder consists of, once all of it is there."""
    files = sorted(path for path in folder.iterdir() if path.name != COMPLETE)
    sizes = {path.name: path.stat().st_size for path in files}
    digest = hashlib.sha256((folder / METADATA).read_bytes()).hexdigest()
    save_json({"version": 1, "metadata_sha256": digest, "files": sizes}, folder / COMPLETE)


def check_sharded(folder: Path) -> None:
    """Look at every byte of a folder.

    Raises:
        ValueError: in one sentence, which names the file: one is missing, cut short, not what was written, or would
            run code.
    """
    _check_listed(folder)
    metadata = _read_metadata(folder)
    for name, places in _by_file(metadata).items():
        _check_shards(folder / name, places)
    load_pickle(folder / EXTRA)


def read_sharded(folder: Path, with_optimizers: bool = False) -> dict[str, Any]:
    """What the checkpoint would hold as one file; the state of optimizers, which is most of it, if that is asked for.

    Raises:
        ValueError: as :func:`check_sharded`, of the files that are read.
    """
    _check_listed(folder)
    metadata = _read_metadata(folder)
    weights = _read(folder, metadata, _WEIGHTS)
    whole = {**load_pickle(folder / EXTRA), "state_dict": {n.removeprefix(_WEIGHTS): v for n, v in weights.items()}}
    put_into(whole, _nested(_read(folder, metadata, _REST), metadata).get(REST, {}))
    if with_optimizers:
        whole["optimizer_states"] = _optimizer_states(_read(folder, metadata, _OPTIMIZER), metadata)
    return whole


def describe_sharded(folder: Path) -> dict[str, Any]:
    """:func:`read_sharded` with tensors that have shapes and no data; they are not read."""
    metadata = _read_metadata(folder)
    weights = {name: torch.empty(entry.size, device="meta") for name, entry in _weights(metadata)}
    described = {**load_pickle(folder / EXTRA), "state_dict": weights}
    put_into(described, describe_rest(folder))
    if any(name.startswith(_OPTIMIZER) for name in metadata.state_dict_metadata):
        described["optimizer_states"] = []
    return described


def describe_rest(folder: Path) -> dict[str, Any]:
    """The sharded tensors beside weights and optimizers, where they lie in a checkpoint; with shapes and no data."""
    metadata = _read_metadata(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(_REST) and isinstance(entry, TensorStorageMetadata)
    }
    return dict(_nested(tensors, metadata).get(REST, {}))


def put_into(whole: dict[str, Any], rest: Mapping[str, Any]) -> None:
    """Values of nested dictionaries go where they belong among others."""
    for key, value in rest.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            put_into(whole[key], value)
        else:
            whole[key] = value


def _check_listed(folder: Path) -> None:
    """All files that were written are there, in the length they had."""
    for name in (METADATA, EXTRA):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not whole: it has no {name}")
    if not (folder / COMPLETE).is_file():  # not written by `flexidit fit`: what .metadata lists must do
        return
    listed = read_json(folder / COMPLETE)
    for name, size in listed.get("files", {}).items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{folder} is not whole: it has no {name}, which one of its processes wrote")
        if path.stat().st_size != size:
            raise ValueError(f"{path} is damaged (it has {path.stat().st_size} bytes of {size})")
    if hashlib.sha256((folder / METADATA).read_bytes()).hexdigest() != listed.get("metadata_sha256"):
        raise ValueError(f"{folder / METADATA} is damaged (it is not what was written)")


def _read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects that only running its code could rebuild, which is refused ({error})"
        ) from None
    except Exception as error:  # whatever damaged bytes make pickle do
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{path} does not describe a checkpoint")
    return metadata


def _by_file(metadata: Metadata) -> dict[str, list[tuple[Any, Any]]]:
    """Entries and where they lie, by file."""
    files: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for index, info in metadata.storage_data.items():
        files[Path(info.relative_path).name].append((index, info))
    return files


def _check_shards(path: Path, places: list[tuple[Any, Any]]) -> None:
    if not path.is_file():
        raise ValueError(f"{path.parent} is not whole: it has no {path.name}, which one of its processes wrote")
    with path.open("rb") as file, bytes_of(file) as data:
        windows = [data[info.offset : info.offset + info.length] for _, info in places]
        problems = in_threads(problem_of, windows)
        for window in windows:
            window.release()
    wrong = next((index.fqn for (index, _), problem in zip(places, problems, strict=True) if problem), None)
    if wrong is not None:
        raise ValueError(f"{path} is damaged (its part {wrong} is not what was written)")
    for index, info in places:
        if index.offset is None:  # not a tensor: torch would rebuild it by whatever means it asks for
            _load_part(path, info, index.fqn)


def _weights(metadata: Metadata) -> Iterator[tuple[str, TensorStorageMetadata]]:
    for name, entry in metadata.state_dict_metadata.items():
        if name.startswith(_WEIGHTS) and isinstance(entry, TensorStorageMetadata):
            yield name.removeprefix(_WEIGHTS), entry


def _read(folder: Path, metadata: Metadata, prefix: str) -> dict[str, Any]:
    """Everything of which the name begins so: tensors put together, and plain values."""
    entries = ((name, entry) for name, entry in metadata.state_dict_metadata.items() if name.startswith(prefix))
    tensors = {
        n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries if isinstance(e, TensorStorageMetadata)
    }
    values: dict[str, Any] = dict(tensors)
    for name, places in _by_file(metadata).items():
        mine = [(index, info) for index, info in places if index.fqn.startswith(prefix)]
        if mine:
            _check_shards(folder / name, mine)
        for index, info in mine:
            part = _load_part(folder / name, info, index.fqn)
            if index.fqn in tensors:
                _put(tensors[index.fqn], part, index)
            else:
                values[index.fqn] = part
    return values


def _optimizer_states(values: dict[str, Any], metadata: Metadata) -> list[dict[str, Any]]:
    """As optimizers have it: parameters by number, in the order of their groups."""
    nested = _nested(values, metadata)
    return [_numbered(nested[name]) for name in sorted(nested, key=lambda name: int(name.rpartition("_")[2]))]


def _nested(values: Mapping[str, Any], metadata: Metadata) -> dict[Any, Any]:
    """The containers that torch made one of; lists become dictionaries."""
    nested: dict[Any, Any] = {}
    for name, path in metadata.planner_data.items():
        if name in values:
            *above, last = path
            place = nested
            for key in above:
                place = place.setdefault(key, {})
            place[last] = values[name]
    return nested


def _numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    groups = [optimizer["param_groups"][number] for number in sorted(optimizer["param_groups"])]
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: state for name, state in optimizer.get("state", {}).items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def _put(whole: Tensor, part: Any, index: Any) -> None:
    for dim, (offset, length) in enumerate(zip(index.offset, part.shape, strict=True)):
        whole = whole.narrow(dim, offset, length)
    whole.copy_(part)


def _load_part(path: Path, info: Any, name: str) -> Any:
    try:
        with path.open("rb") as file:
            file.seek(info.offset)
            return torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds objects that only running its code could rebuild, which is refused ({name})"
        ) from None
    except Exception as error:  # whatever damaged bytes make torch do
        raise ValueError(f"{path} is damaged ({name}: {type(error).__name__})") from None
