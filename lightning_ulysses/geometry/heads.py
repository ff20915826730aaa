"""Assigns attention heads to ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.geometry.shares import even_shares, starts

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class HeadLayout:
    """The query heads that each rank computes, and the key/value heads that they need.

    Each rank gets a contiguous range of query heads. The lengths of the ranges differ by at most one, so neither H nor
    H_kv has to be a multiple of P. If query heads of several ranks share a key/value head, each of these ranks gets it.

    Example:
        9 query heads and 3 key/value heads on 2 ranks: rank 0 gets query heads 0 to 4 with key/value heads 0 and 1,
        rank 1 gets 5 to 8 with 1 and 2.

    Args:
        num_heads: H, the query heads of the attention call.
        num_kv_heads: H_kv, the key/value heads. H must be a multiple of it.
        sp_size: P, the ranks of one sequence-parallel group. At most H.
        may_idle: Whether P may be larger than H, so that the last ranks get no heads.

    Raises:
        UlyssesError: If P > H or H is not a multiple of H_kv.
    """

    num_heads: int
    num_kv_heads: int
    sp_size: int
    may_idle: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UlyssesError(
                f"{self.num_heads} query heads over {self.num_kv_heads} key/value heads",
                "a number of query heads that is a multiple of the number of key/value heads",
                "change the model's head counts",
            )
        if self.sp_size > self.num_heads and not self.may_idle:
            raise UlyssesError(
                f"sp_size={self.sp_size} for an attention call with {self.num_heads} query heads",
                "at least one query head for each rank of a sequence-parallel group",
                f"set sp_size to at most {self.num_heads}",
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def query_shares(self) -> tuple[int, ...]:
        """Query heads per rank, H_r."""
        return even_shares(self.num_heads, self.sp_size)

    @cached_property
    def query_ranges(self) -> Ranges:
        """For each rank its query heads as (first, last + 1)."""
        return tuple(
            (begin, begin + share) for begin, share in zip(starts(self.query_shares), self.query_shares, strict=True)
        )

    @cached_property
    def kv_ranges(self) -> Ranges:
        """For each rank the key/value heads that it needs as (first, last + 1). Ranges of two ranks may overlap."""
        size = self.group_size
        return tuple((begin // size, (end - 1) // size + 1) for begin, end in self.query_ranges)

    def kv_index(self, rank: int) -> tuple[int, ...]:
        """For each query head of ``rank``, the index of its key/value head among those of the rank."""
        return kv_index(self.query_ranges[rank], self.group_size)

    @cached_property
    def uneven_groups(self) -> tuple[tuple[int, ...] | None, ...]:
        """For each rank its `kv_index` if a kernel cannot group the heads by itself, else None; see `uneven_group`."""
        return tuple(
            uneven_group(heads, self.group_size) if heads[0] < heads[1] else None for heads in self.query_ranges
        )


def kv_index(heads: tuple[int, int], group_size: int) -> tuple[int, ...]:
    """For each query head of a range, the index of its key/value head among those that the range needs."""
    begin, end = heads
    first = begin // group_size
    return tuple(head // group_size - first for head in range(begin, end))


def uneven_group(heads: tuple[int, int], group_size: int) -> tuple[int, ...] | None:
    """The `kv_index` of a range of query heads if a kernel cannot group them by itself, else None.

    A kernel can do so (``enable_gqa``) if each key/value head belongs to equally many of the query heads, in order.
    """
    index = kv_index(heads, group_size)
    per_head, rest = divmod(len(index), index[-1] + 1)
    is_grouped = not rest and index == tuple(position // per_head for position in range(len(index)))
    return None if is_grouped else index


@lru_cache(maxsize=256)
def head_layout(num_heads: int, num_kv_heads: int, sp_size: int, may_idle: bool = False) -> HeadLayout:
    """`HeadLayout`, computed once per combination of sizes."""
    return HeadLayout(num_heads, num_kv_heads, sp_size, may_idle)
