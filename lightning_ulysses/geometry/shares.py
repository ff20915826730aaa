"""Divides tokens or heads over ranks as evenly as possible."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1024)
def even_shares(total: int, parts: int) -> tuple[int, ...]:
    """Splits ``total`` into ``parts`` integers that differ by at most one, the larger ones first: 7 in 3 is 3, 2, 2."""
    base, extra = divmod(total, parts)
    return tuple(base + (part < extra) for part in range(parts))


@lru_cache(maxsize=1024)
def starts(shares: tuple[int, ...]) -> tuple[int, ...]:
    """The offset at which each share begins."""
    offsets = [0]
    for share in shares[:-1]:
        offsets.append(offsets[-1] + share)
    return tuple(offsets)
