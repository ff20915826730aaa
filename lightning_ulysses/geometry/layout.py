"""Cuts the sequences of one batch into one slice for each rank of a group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.shares import even_shares, shares_apart, starts

# Ranges of tokens (begin, end) in one row, in order and without overlap.
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SequenceLayout:
    """The geometry of one batch: slices, documents and padding.

    It is built once for each batch, on the host. No layer builds it again, and no collective is needed.

    Args:
        seq_len: S, the tokens of the whole sequence. Includes padding that this package added.
        sp_size: P.
        documents: For each of the B rows the documents packed into it as ``(begin, end)``. They are in order and cover
            the row. ``None`` if every row is one document.
        valid: For each row the runs of tokens that a 2-D attention mask keeps. ``None`` without such a mask.
        num_padding: Tokens that this package added at the end of each row to reach a multiple. No real token may attend
            to them.
        uncached: Other documents, which transformers sees in calls without a mask and without a cache.
        beside: Shares of other sequences in the same step; see `shares_apart`.
        parts: Sequences of which this one consists, one after the other. A rank holds its slice of each.

    Raises:
        UlyssesError: If S < P.
    """

    seq_len: int
    sp_size: int
    documents: tuple[Runs, ...] | None = None
    valid: tuple[Runs, ...] | None = None
    num_padding: int = 0
    uncached: tuple[Runs, ...] | None = None
    beside: tuple[tuple[int, ...], ...] = ()
    parts: tuple[SequenceLayout, ...] = ()

    def __post_init__(self) -> None:
        if self.seq_len < self.sp_size:
            raise UlyssesError(
                f"a batch of {self.seq_len} tokens per row for sp_size={self.sp_size}",
                "at least one token for each rank",
                "use longer sequences (pack short ones together) or a smaller sp_size",
            )
        if self.beside and shares_apart(self.seq_len, self.sp_size, self.beside) is None:
            raise UlyssesError(
                f"a sequence of {self.seq_len} tokens beside one of {sum(self.beside[0])} for sp_size={self.sp_size}",
                "lengths of which each rank gets different shares",
                "pad one of them further, or use a smaller sp_size",
            )

    @property
    def real_len(self) -> int:
        """S without the padding that this package added."""
        return self.seq_len - self.num_padding

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Tokens per rank, S_r. They differ by at most one, except `beside` another sequence of nearly the same S."""
        if self.parts:
            return tuple(map(sum, zip(*(part.shares for part in self.parts), strict=True)))
        apart = shares_apart(self.seq_len, self.sp_size, self.beside) if self.beside else None
        return apart or even_shares(self.seq_len, self.sp_size)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Position of each rank's first token in the whole sequence."""
        return starts(self.shares)

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """For each rank its tokens as a Python slice of the whole sequence."""
        return tuple(slice(begin, begin + share) for begin, share in zip(self.starts, self.shares, strict=True))

    @classmethod
    def of_both(cls, *parts: SequenceLayout) -> SequenceLayout:
        """The geometry of sequences that stand one after the other."""
        return cls(sum(part.seq_len for part in parts), parts[0].sp_size, parts=parts)

    def runs_of(self, rank: int) -> Runs:
        """The runs of tokens that a rank holds, counted in the whole sequence."""
        if not self.parts:
            span = self.spans[rank]
            return ((span.start, span.stop),)
        begins = starts(tuple(part.seq_len for part in self.parts))
        return tuple(
            (begin + part.spans[rank].start, begin + part.spans[rank].stop)
            for begin, part in zip(begins, self.parts, strict=True)
        )

    @property
    def order(self) -> list[int]:
        """The tokens in the order in which attention has them after the exchange: those of the first rank first."""
        runs = (run for rank in range(self.sp_size) for run in self.runs_of(rank))
        return [token for begin, end in runs for token in range(begin, end)]


def clip(runs: Runs, begin: int, end: int) -> Runs:
    """The part of ``runs`` inside ``begin:end``, counted from ``begin``."""
    clipped = ((max(left, begin) - begin, min(right, end) - begin) for left, right in runs)
    return tuple((left, right) for left, right in clipped if left < right)


def runs_from_starts(begins: list[int], seq_len: int) -> Runs:
    """Documents from the indices where they begin. The first document always begins at 0."""
    # The set drops documents without a token: their edges are equal.
    edges = [*sorted({0, *begins}), seq_len]
    return tuple((begin, end) for begin, end in pairwise(edges) if begin < end)


def cu_seqlens_to_runs(cu_seqlens: list[int], seq_len: int) -> Runs:
    """Documents from cumulative lengths. Tokens after the last document form a document of their own.

    Example:
        [0, 2, 5] in a row of 6 tokens gives the documents (0, 2), (2, 5) and (5, 6).

    Raises:
        UlyssesError: If the lengths do not start at 0, fall, or end after S.
    """
    grows = all(left <= right for left, right in pairwise(cu_seqlens))
    if not cu_seqlens or cu_seqlens[0] != 0 or not grows or cu_seqlens[-1] > seq_len:
        raise UlyssesError(
            f"cu_seqlens {cu_seqlens[:8]}{'...' if len(cu_seqlens) > 8 else ''} for rows of {seq_len} tokens",
            "cumulative document lengths that start at 0, never fall, and end at the row's length at most",
            "compute cu_seqlens from the lengths of the documents packed into the row",
        )
    return runs_from_starts([edge for edge in cu_seqlens if edge < seq_len], seq_len)
