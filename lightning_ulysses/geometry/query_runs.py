"""Divides the queries of a sequence over ranks that hold all of its keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from lightning_ulysses.geometry.shares import even_shares, starts


@dataclass(frozen=True)
class QueryRuns:
    """The queries that each of R ranks attends with, given the consecutive tokens that it holds.

    A rank attends with its own tokens. Where a query sees the keys before it, later ones cost more: then tokens are cut
    in 2 R parts, and rank i takes part i and part 2 R - 1 - i, which together cost the same on every rank.

    Example:
        8 and 8 tokens, balanced: rank 0 takes tokens 0 to 3 and 12 to 15, rank 1 takes 4 to 11 in two runs.

    Args:
        lengths: Tokens of each rank.
        is_balanced: Whether parts are taken in pairs. Then each rank has two tokens or more.
    """

    lengths: tuple[int, ...]
    is_balanced: bool = False

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Tokens of each of the 2 R parts: the first and the second half of each rank's tokens."""
        return tuple(half for length in self.lengths for half in even_shares(length, 2))

    def taken(self, rank: int) -> tuple[int, ...]:
        """The parts that a rank attends with, in their order."""
        return rank, len(self.parts) - 1 - rank

    def taker(self, part: int) -> int:
        """The rank that attends with a part."""
        return min(part, len(self.parts) - 1 - part)

    def of(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The runs of queries of a rank as (first, last + 1) in the whole sequence, in their order."""
        if not self.is_balanced:
            begin = starts(self.lengths)[rank]
            return ((begin, begin + self.lengths[rank]),)
        begins = starts(self.parts)
        return tuple((begins[part], begins[part] + self.parts[part]) for part in self.taken(rank))


@lru_cache(maxsize=256)
def query_runs(lengths: tuple[int, ...], grows: bool) -> QueryRuns:
    """The runs of a call; ``grows`` if later queries see more keys."""
    return QueryRuns(lengths, grows and min(lengths) >= 2)


def most_ulysses(num_heads: int, most: int) -> int:
    """The largest number of ranks that exchange heads: it divides ``most``, and each rank gets a head.

    Args:
        num_heads: H.
        most: Ranks that exchange heads where there are enough.
    """
    return max(size for size in range(1, min(num_heads, most) + 1) if most % size == 0)
