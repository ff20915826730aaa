"""Which keys a query may see, without a mask tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lightning_ulysses.geometry.layout import Runs


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query may see, without a mask tensor.

    Args:
        causal: Query i sees keys up to i.
        window: Query i sees keys after i - window only.
        documents: Per row, the documents that must not see each other.
        valid: Per row, the runs of keys that a padding mask keeps.
        num_padding: Keys at the end of every row that nothing may see.
        ahead: With ``window`` and without ``causal``, query i sees keys up to i + ahead only.
        chunk: Queries see keys of their own chunk of so many tokens only, counted from the start of the document, or
            behind the left padding of the row.
    """

    causal: bool
    window: int | None = None
    documents: tuple[Runs, ...] | None = None
    valid: tuple[Runs, ...] | None = None
    num_padding: int = 0
    ahead: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not self.causal and self.ahead is None:
            raise ValueError("a window that is not causal needs `ahead`")

    @cached_property
    def reach(self) -> tuple[int, int] | None:
        """How many keys before and behind it a query sees; None if that is not limited."""
        if self.window is None:
            return None
        return self.window - 1, 0 if self.causal else self.ahead or 0
