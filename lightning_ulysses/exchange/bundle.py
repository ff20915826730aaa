"""Tensors of any number and dtype in one all-to-all: slices with all heads -> the whole sequence with some heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.exchange.all_to_all import Ranges, gather_heads, scatter_heads


def _overlap(ends: Ranges) -> bool:
    """Whether some head goes to several ranks, whose gradients are summed."""
    return any(before[1] > after[0] for before, after in pairwise(ends))


def wire_dtype(dtypes: Sequence[torch.dtype], ranges: Sequence[Ranges]) -> torch.dtype:
    """The dtype of the buffer that holds all tensors.

    It is the narrowest of theirs, in which wider numbers are several elements, bit by bit. Heads of several ranks are
    summed in it: where those are wider, the buffer has the widest dtype.
    """
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
    summed = {dtype for dtype, ends in zip(dtypes, ranges, strict=True) if _overlap(ends)}
    if not summed:
        return narrowest
    if len(summed) == 1 and (only := summed.pop()).itemsize == narrowest.itemsize:
        return only
    return reduce(torch.promote_types, dtypes)


def _written(tensor: Tensor, wire: torch.dtype) -> Tensor:
    """(B, heads, tokens, D) -> (B, heads, tokens, elements of the buffer)."""
    if wire.itemsize <= tensor.dtype.itemsize and wire != tensor.dtype:
        return tensor.contiguous().view(wire)
    return tensor.to(wire)


def _read(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The opposite of `_written`."""
    if part.dtype.itemsize <= dtype.itemsize and part.dtype != dtype:
        return part.contiguous().view(dtype)
    return part.to(dtype)


class _Bundle(torch.autograd.Function):
    # Scatters heads and gathers tokens. The backward is the adjoint: it gathers heads and scatters tokens.
    @staticmethod
    def forward(
        ctx: Any,
        ranges: tuple[Ranges, ...],
        shares: tuple[int, ...],
        rank: int,
        group: dist.ProcessGroup,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.place = ranges, (shares, rank, group)
        ctx.totals, ctx.dtypes = tuple(each.shape[1] for each in tensors), tuple(each.dtype for each in tensors)
        ctx.wire = wire_dtype(ctx.dtypes, ranges)
        parts = scatter_heads(tuple(_written(each, ctx.wire) for each in tensors), ranges, *ctx.place)
        return tuple(_read(part, dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        parts = tuple(_written(grad, ctx.wire) for grad in grads)
        wholes = gather_heads(parts, ctx.ranges, ctx.totals, *ctx.place)
        return None, None, None, None, *(_read(each, dtype) for each, dtype in zip(wholes, ctx.dtypes, strict=True))


def bundle_to_heads(
    tensors: Sequence[Tensor],
    ranges: Sequence[Ranges],
    shares: tuple[int, ...],
    rank: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """One all-to-all that gives this rank the whole sequence for its heads of each tensor; one in the backward.

    Args:
        tensors: Each (B, heads, S_r, D). Numbers of heads, D and dtypes may differ.
        ranges: For each tensor the heads of each rank. Where ranks share heads, their gradients are summed.
        shares: S_r of every rank.
        rank: This process's rank in ``group``.
        group: The sequence-parallel group.

    Returns:
        Each (B, heads of this rank, S, D).
    """
    parts: tuple[Tensor, ...] = _Bundle.apply(tuple(ranges), shares, rank, group, *tensors)
    return parts
