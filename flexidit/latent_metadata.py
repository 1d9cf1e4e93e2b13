"""``metadata.json`` of a folder of latents: how they were made, and one entry a shard."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexidit.files import write_atomically

FORMAT = "flexidit-latents-1"
METADATA_FILE = "metadata.json"


@dataclass
class ShardEntry:
    """What the metadata says about one shard."""

    file: str
    count: int
    bytes: int
    sha256: str
    channel_mean: list[float]
    """Mean of the sampled latents per channel, in the model's scale."""
    channel_std: list[float]
    """Standard deviation of the sampled latents per channel, the VAE's own deviation included."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """What was left out."""
    truncated: list[dict[str, str]] = field(default_factory=list)
    """Captions that lost their ends."""

    def __post_init__(self) -> None:
        is_here = Path(self.file).name == self.file and self.file.endswith(".safetensors")
        if not (is_here and 0 <= self.count < 1 << 48 and self.bytes >= 0):
            raise ValueError(f"the shard {self.file!r} is no file of the folder, or has no count of samples and bytes")

    def damage(self, root: Path) -> str | None:
        """Why the file cannot be used, or None; looks at its size and not at its content."""
        path = root / self.file
        if not path.is_file():
            return "missing"
        if path.stat().st_size != self.bytes:
            return f"cut or altered: {path.stat().st_size} of {self.bytes} bytes"
        return None


@dataclass
class Metadata:
    """Content of ``metadata.json``."""

    fingerprint: dict[str, Any]
    """What makes latents interchangeable: codec, sizes, crop, flips; of captioned ones the text encoder too."""
    source: dict[str, Any]
    """What was encoded, for continuing: number of files, hash of names with labels or captions, shard size, dtype."""
    latent_shape: list[int]
    complete: bool = False
    shards: dict[str, ShardEntry] = field(default_factory=dict)
    """By shard number, written as text."""

    @classmethod
    def load(cls, root: str | Path) -> "Metadata":
        """Read it from a folder of latents.

        Raises:
            FileNotFoundError: if the folder holds no metadata.
            ValueError: if the file is damaged or of another format.
        """
        path = Path(root) / METADATA_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no latents in {root}: it has no {METADATA_FILE}; run `flexidit encode`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format", None) != FORMAT:
                raise ValueError(f"not of format {FORMAT}")
            shards = {number: ShardEntry(**entry) for number, entry in content.pop("shards").items()}
            return cls(**content, shards=shards)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not readable as latent metadata ({error}): encode again") from error

    def save(self, root: Path) -> None:
        """Write it to a folder, atomically."""
        content = {"format": FORMAT, **asdict(self)}
        content["shards"] = dict(sorted(content["shards"].items(), key=lambda item: int(item[0])))
        for entry in content["shards"].values():
            if not entry["truncated"]:  # labels have none, and readers without captions do not know the field
                del entry["truncated"]
        text = json.dumps(content, indent=1)
        write_atomically(root / METADATA_FILE, text.encode())

    def entries(self) -> list[ShardEntry]:
        """The shards in order."""
        return [self.shards[number] for number in sorted(self.shards, key=int)]

    @property
    def num_samples(self) -> int:
        """Samples that were encoded."""
        return sum(entry.count for entry in self.shards.values())

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of the latents per channel, over all shards."""
        entries = [entry for entry in self.entries() if entry.count]
        count = torch.tensor([entry.count for entry in entries], dtype=torch.float64)[:, None]
        mean = torch.tensor([entry.channel_mean for entry in entries], dtype=torch.float64)
        std = torch.tensor([entry.channel_std for entry in entries], dtype=torch.float64)
        total_mean = (count * mean).sum(0) / count.sum()
        square = (count * (std.square() + mean.square())).sum(0) / count.sum()
        return {"mean": total_mean.tolist(), "std": (square - total_mean.square()).clamp(min=0).sqrt().tolist()}
