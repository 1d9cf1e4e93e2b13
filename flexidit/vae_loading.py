"""Reading a VAE from a diffusers folder or the hub: frozen, complete, and nothing but a VAE that is supported."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexidit.vae_layout import SUPPORTED


def load_vae(source: str | Path) -> nn.Module:
    """Read a frozen VAE from a folder or the hub, safetensors only.

    Raises:
        FileNotFoundError: if a path holds no VAE.
        ValueError: if it is another model, its weights are incomplete or damaged, or the hub cannot be reached.
    """
    import diffusers
    from safetensors import SafetensorError

    location, subfolder = _locate(source)
    options: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    try:
        name = diffusers.AutoencoderKL.load_config(location, **options).get("_class_name")
        if name in SUPPORTED:
            options |= {"use_safetensors": True, "torch_dtype": torch.float32, "output_loading_info": True}
            with _quiet():  # AutoencoderTiny warns about a field of its own configuration
                vae, info = getattr(diffusers, name).from_pretrained(location, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(_unavailable(source, error)) from error
    if name not in SUPPORTED:
        raise ValueError(f"{source} is a {name}, not a VAE that is supported: {' or '.join(SUPPORTED)}")
    if info["missing_keys"]:  # diffusers would leave these at random values, with a warning only
        raise ValueError(f"the weights of {source} lack {len(info['missing_keys'])} tensors of {name}")
    return vae.eval().requires_grad_(False)


def weights_sha256(vae: nn.Module) -> str:
    """Hash of the weights in float32, tensor by tensor.

    The file format, its dtype of equal values and the folder's name do not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _locate(source: str | Path) -> tuple[str, str | None]:
    """``(folder or hub id, subfolder)``; what looks like a path must exist."""
    path = Path(source).expanduser()
    if path.is_dir():
        for subfolder in (None, "vae"):
            config = path / (subfolder or "") / "config.json"
            if config.is_file() and "_class_name" in json.loads(config.read_text(encoding="utf-8")):
                return str(path), subfolder
        raise FileNotFoundError(f"no VAE in {path}: expected config.json and diffusion_pytorch_model.safetensors")
    text = str(source)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(f"no VAE at {text}: give a diffusers VAE folder, or a hub id such as owner/name")
    return text, None


def _unavailable(source: str | Path, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(source).expanduser().is_dir():
        return f"the VAE in {source} cannot be read ({first}): download it again"
    return f"{source} is no local folder and the hub did not deliver it ({first}): give the path of a VAE folder"
