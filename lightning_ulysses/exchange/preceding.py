"""Tokens before a slice, which lie on the ranks before, for what looks back by a few tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.geometry.shares import starts


def seen_before(shares: tuple[int, ...], count: int) -> tuple[tuple[int, int], ...]:
    """For each rank the ``count`` tokens before its slice as (first, last + 1); fewer near the beginning."""
    return tuple((max(begin - count, 0), begin) for begin in starts(shares))


def _overlaps(shares: tuple[int, ...], count: int, owner: int) -> list[tuple[int, int]]:
    """For each rank what it sees of the slice of ``owner``, counted from the beginning of that slice."""
    begin = starts(shares)[owner]
    found = []
    for first, end in seen_before(shares, count):
        low = min(max(first - begin, 0), shares[owner])
        found.append((low, max(min(end - begin, shares[owner]), low)))
    return found


class _Preceding(torch.autograd.Function):
    # Sends the last tokens of slices onwards. The backward sends their gradients back, where they are summed.
    @staticmethod
    def forward(
        ctx: Any, part: Tensor, count: int, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.place, ctx.shape = (count, shares, rank, group), part.shape
        mine = _overlaps(shares, count, rank)
        theirs = [_overlaps(shares, count, owner)[rank] for owner in range(len(shares))]
        width = part[:1].numel()
        send = torch.cat([part[low:high] for low, high in mine])
        ctx.sizes = [(high - low) * width for low, high in mine], [(high - low) * width for low, high in theirs]
        received = part.new_empty(sum(high - low for low, high in theirs), *part.shape[1:])
        # Each (tokens, ...) -> (elements,)
        dist.all_to_all_single(received.view(-1), send.view(-1), ctx.sizes[1], ctx.sizes[0], group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, shares, rank, group = ctx.place
        mine = _overlaps(shares, count, rank)
        received = grads[0].new_empty(sum(high - low for low, high in mine), *ctx.shape[1:])
        # Each (tokens, ...) -> (elements,)
        dist.all_to_all_single(
            received.view(-1), grads[0].contiguous().view(-1), ctx.sizes[0], ctx.sizes[1], group=group
        )
        total = grads[0].new_zeros(ctx.shape)
        for (low, high), part in zip(mine, received.split([high - low for low, high in mine]), strict=True):
            total[low:high] += part
        return total, None, None, None, None


def preceding(
    part: Tensor, dim: int, count: int, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup
) -> Tensor:
    """The tokens before this rank's slice, with gradients, by one small all-to-all in forward and backward.

    Args:
        part: This rank's slice, (..., S_r, ...).
        dim: The dimension that carries the sequence.
        count: How many tokens to look back. They may lie on several ranks.
        shares: S_r of every rank.
        rank: This process's rank in ``group``.
        group: The sequence-parallel group.

    Returns:
        (..., n, ...), where n is ``count``, or the number of tokens before the slice if there are fewer.
    """
    # (..., S_r, ...) -> (S_r, ...) -> (n, ...) -> (..., n, ...)
    before: Tensor = _Preceding.apply(part.movedim(dim, 0).contiguous(), count, shares, rank, group)
    return before.movedim(0, dim)
