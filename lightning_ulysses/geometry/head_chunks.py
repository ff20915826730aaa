"""Divides the attention heads of each rank into chunks, which are exchanged and attended one after another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lightning_ulysses.geometry.heads import Ranges, head_layout, uneven_group
from lightning_ulysses.geometry.shares import even_shares, starts


@dataclass(frozen=True)
class HeadChunk:
    """The heads that each rank computes at a time, in the numbers of the whole model. All ranges are (first, last + 1).

    Consecutive chunks of a rank may share a key/value head. It travels once in each direction: it comes with the first
    of them, and its gradient leaves with the last.

    Attributes:
        query_ranges: For each rank its query heads; at least one.
        kv_ranges: For each rank the key/value heads that these need.
        new_ranges: Those of them that no earlier chunk of the rank needed; empty for some ranks.
        done_ranges: Those of them that no later chunk of the rank needs; empty for some ranks.
        uneven_groups: For each rank the key/value head of each query head, or None; see `heads.uneven_group`.
    """

    query_ranges: Ranges
    kv_ranges: Ranges
    new_ranges: Ranges
    done_ranges: Ranges
    uneven_groups: tuple[tuple[int, ...] | None, ...]


def most_chunks(num_heads: int, sp_size: int) -> int:
    """The largest number of chunks: no rank may have an empty one."""
    return num_heads // sp_size


@lru_cache(maxsize=256)
def head_chunks(num_heads: int, num_kv_heads: int, sp_size: int, count: int) -> tuple[HeadChunk, ...]:
    """The chunks of all ranks, equally many for each.

    Example:
        9 query heads and 3 key/value heads on 2 ranks in 2 chunks: rank 0 computes query heads 0 to 2 with key/value
        head 0, then 3 and 4 with 1. Rank 1 computes 5 and 6 with 1 and 2, then 7 and 8 with 2, which it has already.

    Args:
        num_heads: H.
        num_kv_heads: H_kv.
        sp_size: P.
        count: The number of chunks, at most `most_chunks`.
    """
    layout = head_layout(num_heads, num_kv_heads, sp_size)
    size = layout.group_size
    # For each rank its chunks.
    queries: list[Ranges] = []
    for begin, end in layout.query_ranges:
        shares = even_shares(end - begin, count)
        queries.append(tuple((begin + at, begin + at + n) for at, n in zip(starts(shares), shares, strict=True)))
    keys = [tuple((begin // size, (end - 1) // size + 1) for begin, end in ranges) for ranges in queries]
    chunks = []
    for number in range(count):
        new, done = [], []
        for ranges in keys:
            first, last = ranges[number]
            new.append((first if number == 0 else max(first, ranges[number - 1][1]), last))
            done.append((first, last if number == count - 1 else min(last, ranges[number + 1][0])))
        here = tuple(ranges[number] for ranges in queries)
        chunks.append(
            HeadChunk(
                here,
                tuple(ranges[number] for ranges in keys),
                tuple(new),
                tuple(done),
                tuple(uneven_group(heads, size) for heads in here),
            )
        )
    return tuple(chunks)
