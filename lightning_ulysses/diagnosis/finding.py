"""One line of a diagnosis."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """Something that was looked at.

    Args:
        topic: What was looked at, in a word or two.
        found: What is there.
        mend: What to do about it; None if nothing has to be done.
    """

    topic: str
    found: str
    mend: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        line = f"{'ok' if self.mend is None else 'MEND':<5}{self.topic}: {self.found}"
        return line if self.mend is None else f"{line}\n     -> {self.mend}"


def size(number: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"
