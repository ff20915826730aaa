"""Which rank computes which attention heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.shares import even_shares, starts


@dataclass(frozen=True)
class HeadLayout:
    """The query heads that each rank computes and the key/value heads that it needs for them.

    Query heads are dealt out in contiguous runs whose lengths differ by at most one, so neither H nor H_kv has to be a
    multiple of P. A key/value head that serves query heads on several ranks is sent to each of them.

    Args:
        num_heads: H, the query heads of the whole model.
        num_kv_heads: H_kv, the key/value heads; H must be a multiple of it.
        sp_size: P, the ranks of one sequence-parallel group; at most H.

    Raises:
        UlyssesError: If P > H or H is not a multiple of H_kv.
    """

    num_heads: int
    num_kv_heads: int
    sp_size: int

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UlyssesError(
                f"{self.num_heads} query heads over {self.num_kv_heads} key/value heads",
                "a number of query heads that is a multiple of the number of key/value heads",
                "change the model's head counts",
            )
        if self.sp_size > self.num_heads:
            raise UlyssesError(
                f"sp_size={self.sp_size} for an attention call with {self.num_heads} query heads",
                "at least one query head for each rank of a sequence-parallel group",
                f"set sp_size to at most {self.num_heads}",
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_shares(self) -> tuple[int, ...]:
        """Query heads per rank, H_r."""
        return even_shares(self.num_heads, self.sp_size)

    def query_range(self, rank: int) -> tuple[int, int]:
        """First and one-past-last query head of ``rank``."""
        begin = starts(self.query_shares)[rank]
        return begin, begin + self.query_shares[rank]

    def kv_range(self, rank: int) -> tuple[int, int]:
        """First and one-past-last key/value head that ``rank`` needs."""
        begin, end = self.query_range(rank)
        return begin // self.group_size, (end - 1) // self.group_size + 1

    @property
    def query_ranges(self) -> tuple[tuple[int, int], ...]:
        """`query_range` of every rank."""
        return tuple(self.query_range(rank) for rank in range(self.sp_size))

    @property
    def kv_ranges(self) -> tuple[tuple[int, int], ...]:
        """`kv_range` of every rank."""
        return tuple(self.kv_range(rank) for rank in range(self.sp_size))

    def kv_index(self, rank: int) -> tuple[int, ...]:
        """For each query head of ``rank``, its key/value head counted from the rank's first one."""
        begin, end = self.query_range(rank)
        first = begin // self.group_size
        return tuple(head // self.group_size - first for head in range(begin, end))

    def is_grouped(self, rank: int) -> bool:
        """Whether every key/value head of ``rank`` serves equally many of its query heads, in order."""
        begin, end = self.kv_range(rank)
        index = self.kv_index(rank)
        per_head, rest = divmod(len(index), end - begin)
        return not rest and index == tuple(position // per_head for position in range(len(index)))


@lru_cache(maxsize=256)
def head_layout(num_heads: int, num_kv_heads: int, sp_size: int) -> HeadLayout:
    """`HeadLayout`, computed once per combination of sizes."""
    return HeadLayout(num_heads, num_kv_heads, sp_size)
