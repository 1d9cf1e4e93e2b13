"""What makes latents interchangeable, and how two such descriptions differ."""

from collections.abc import Mapping
from typing import Any


def make_fingerprint(codec: Mapping[str, Any], reader: Mapping[str, Any], *, has_flip: bool) -> dict[str, Any]:
    """Fingerprint of a set of latents, of the codec's and the reader's."""
    return {"codec": dict(codec), **reader, "has_flip": has_flip}


def check_fingerprint(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Refuse latents that were made in another way than the run is configured for.

    Args:
        found: fingerprint of the latents.
        expected: what the run is configured for; fields that it lacks are not compared.
        where: name of the latents for the message.

    Raises:
        ValueError: naming the first field that differs, and both values.
    """
    for name, (theirs, ours) in fingerprint_differences(found, expected).items():
        if name.endswith("_sha256") and name.startswith("names_and"):
            raise ValueError(f"the latents in {where} are of other files, labels or captions: give another folder")
        raise ValueError(
            f"the latents in {where} were made with {name} = {theirs!r}, this run is configured for {ours!r}: "
            "encode again, or configure the run as they were made"
        )


def fingerprint_differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Fields of ``expected`` that differ, by dotted name, as (found, expected)."""
    differences: dict[str, tuple[Any, Any]] = {}
    for name, ours in expected.items():
        theirs = found.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            differences |= fingerprint_differences(theirs, ours, f"{prefix}{name}.")
        elif theirs != ours:
            differences[prefix + name] = (theirs, ours)
    return differences
