"""What could not be read, by name and reason: broken data is counted, never passed over in silence."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


class BrokenFileError(ValueError):
    """A file that cannot be used; the message is the reason, without the file's name."""


def printable(text: str) -> str:
    """A name as a terminal may be shown it: control characters and broken code points are spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@dataclass(frozen=True)
class Skip:
    """One thing that was left out, and why."""

    name: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        """Plain dictionary, for JSON."""
        return {"file": self.name, "reason": self.reason}


@dataclass
class SkipReport:
    """The things that a reader left out.

    Example:
        >>> report = SkipReport()
        >>> report.add("a.jpg", "zero bytes")
        >>> report.summary("image")
        '1 image skipped: a.jpg (zero bytes)'
    """

    skips: list[Skip] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Count one more."""
        self.skips.append(Skip(name, reason))

    def extend(self, skips: Iterable[Skip]) -> None:
        """Count those of another report."""
        self.skips.extend(skips)

    def by_reason(self) -> dict[str, int]:
        """How often each reason occurred, most frequent first."""
        return dict(Counter(skip.reason for skip in self.skips).most_common())

    def summary(self, noun: str, limit: int = 5) -> str:
        """One line: how many, and the first ``limit`` by name."""
        named = ", ".join(f"{skip.name} ({skip.reason})" for skip in self.skips[:limit])
        more = f", and {len(self) - limit} more" if len(self) > limit else ""
        plural = "" if len(self) == 1 else "s"
        return f"{len(self)} {noun}{plural} skipped" + (f": {named}{more}" if self.skips else "")

    def __len__(self) -> int:
        return len(self.skips)

    def __iter__(self) -> Iterator[Skip]:
        return iter(self.skips)
