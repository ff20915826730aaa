"""Describes an attention mask over the whole sequence by a few numbers instead of a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from lightning_ulysses.geometry.layout import Runs, clip


@dataclass(frozen=True)
class MaskSpec:
    """The keys that each query sees. All conditions hold together.

    Args:
        causal: Query i sees keys up to i.
        window: Sliding window. Query i sees only keys after i - window.
        documents: For each row its documents. A query sees only keys of its own document.
        valid: For each row the runs of keys that a padding mask keeps.
        num_padding: Keys at the end of every row that no query sees.
        ahead: With ``window`` and without ``causal``, query i sees only keys up to i + ahead.
        chunk: A query sees only keys of its own chunk of so many tokens. Chunks are counted from the start of the
            document, after the left padding of the row.
        is_other: Whether keys are those of another sequence than the queries, with a length of its own. They have
            neither order nor documents.
    """

    causal: bool
    window: int | None = None
    documents: tuple[Runs, ...] | None = None
    valid: tuple[Runs, ...] | None = None
    num_padding: int = 0
    ahead: int | None = None
    chunk: int | None = None
    is_other: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and not self.causal and self.ahead is None:
            raise ValueError("a window that is not causal needs `ahead`")

    @cached_property
    def reach(self) -> tuple[int, int] | None:
        """How many keys before its own and how many after it a query sees; None if there is no window."""
        if self.window is None:
            return None
        return self.window - 1, 0 if self.causal else self.ahead or 0

    def unpadded(self, real_len: int) -> MaskSpec:
        """The same over the first ``real_len`` tokens, which are all but those that this package added."""
        if not self.num_padding:
            return self
        documents, valid = (
            None if rows is None else tuple(clip(row, 0, real_len) for row in rows)
            for rows in (self.documents, self.valid)
        )
        return replace(self, documents=documents, valid=valid, num_padding=0)
