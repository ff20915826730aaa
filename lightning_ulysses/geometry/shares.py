"""Divides tokens or heads over ranks as evenly as possible."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1024)
def even_shares(total: int, parts: int) -> tuple[int, ...]:
    """Splits ``total`` into ``parts`` integers that differ by at most one, the larger ones first: 7 in 3 is 3, 2, 2."""
    base, extra = divmod(total, parts)
    return tuple(base + (part < extra) for part in range(parts))


@lru_cache(maxsize=1024)
def shares_apart(total: int, parts: int, others: tuple[tuple[int, ...], ...]) -> tuple[int, ...] | None:
    """Shares that differ from ``others`` on every rank, so that the length of a slice tells its sequence.

    The first rank takes a few tokens of each other one, if even shares are no such shares: 32 in 2 beside 17, 16 is
    18, 14. Shares that are all equal to those of another sequence are no problem, since its geometry is the same.

    Args:
        total: S.
        parts: P.
        others: Shares of other sequences.

    Returns:
        The shares; None if there are none.
    """
    even = even_shares(total, parts)
    if even in others:
        return even
    for moved in range(2 * len(others) + 1):
        shares = (even[0] + moved * (parts - 1), *(share - moved for share in even[1:]))
        collides = any(one == other for taken in others for one, other in zip(shares, taken, strict=True))
        if not collides and min(shares) > 0:
            return shares
    return None


@lru_cache(maxsize=1024)
def starts(shares: tuple[int, ...]) -> tuple[int, ...]:
    """The offset at which each share begins."""
    offsets = [0]
    for share in shares[:-1]:
        offsets.append(offsets[-1] + share)
    return tuple(offsets)
