r"""The cut and the join of a sequence inside a model, and why gradients stay exact.

All ranks together minimise sum_w c_w * L_w, with the weights c_w of `loss.token_mean`. Each rank has its own copy of
the parameters. ZeRO sums the gradients of the copies and divides by W, which c_w contains. The result is the gradient
of this sum if the backward of every exchange between ranks is its adjoint:

- The cut takes a slice, and its backward pads the gradient with zeros. The layers before the cut run on the whole
  sequence on every rank. Each rank gets a part of their gradient, and the sum over ranks is all of it.
- The join is an all-gather of slices, and its backward sums the gradients that all ranks have for a slice. After the
  join every rank computes the whole loss L. Each of the P ranks counts n / P of its n targets, so c_w = (n / P) * W /
  N, which is 1/P of the weight of L. Without the sum, a slice would get only 1/P of its gradient.

The layers after the join run on every rank with 1/P of the weight. The sum over ranks is again the whole gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.exchange.gather import join_sequence
from lightning_ulysses.geometry.layout import SequenceLayout


def cut(tensor: Tensor, dim: int, layout: SequenceLayout, rank: int) -> Tensor:
    """(..., S, ...) -> (..., S_r, ...), with gradients."""
    (begin, end), *rest = layout.runs_of(rank)
    if rest:
        return torch.cat([tensor.narrow(dim, first, last - first) for first, last in layout.runs_of(rank)], dim)
    # With B > 1 this is a copy, and the whole tensor can be freed. With B = 1 it is contiguous and stays a view.
    return tensor.narrow(dim, begin, end - begin).contiguous()


def sum_slices(whole: Tensor, dim: int, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
    """A reduce-scatter with uneven slices, (..., S, ...) -> (..., S_r, ...): the sum over ranks of this slice."""
    # (..., S, ...) -> (S, ...)
    send = whole.movedim(dim, 0).contiguous()
    # An all-to-all, since reduce_scatter wants slices of equal length.
    received = send.new_empty(len(shares), shares[rank], *send.shape[1:])
    width = send[0].numel()
    # (P, S_r, ...) and (S, ...) -> (elements,)
    dist.all_to_all_single(
        received.view(-1),
        send.view(-1),
        [shares[rank] * width] * len(shares),
        [share * width for share in shares],
        group=group,
    )
    # (P, S_r, ...) -> (S_r, ...) -> (..., S_r, ...); half precision is summed in float32
    total = received.float().sum(dim=0).to(whole.dtype) if whole.dtype.itemsize < 4 else received.sum(dim=0)
    return total.movedim(0, dim)


class _Join(torch.autograd.Function):
    # All-gathers slices. The backward is the adjoint, a reduce-scatter.
    @staticmethod
    def forward(
        ctx: Any, part: Tensor, dim: int, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.place = dim, shares, rank, group
        return join_sequence(part, shares, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return sum_slices(grads[0], *ctx.place), None, None, None, None


def join_shares(part: Tensor, dim: int, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
    """(..., S_r, ...) -> (..., S, ...) on every rank, with gradients; a collective in forward and backward.

    Args:
        part: This rank's slice.
        dim: The dimension that carries the sequence.
        shares: Tokens of each rank; one of them may be 0.
        rank: Of this process in the group.
        group: The group.
    """
    whole: Tensor = _Join.apply(part, dim, shares, rank, group)
    return whole


def join(part: Tensor, dim: int, layout: SequenceLayout, rank: int, group: dist.ProcessGroup) -> Tensor:
    """`join_shares` of the slices of a layout."""
    return join_shares(part, dim, layout.shares, rank, group)


class _SumOverRanks(torch.autograd.Function):
    # An all-reduce, and its adjoint: every rank has a part of the gradient of the sum.
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(part, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_reduced(grads[0], ctx.group), None


def _all_reduced(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    # all_reduce writes in place and needs contiguous memory.
    total = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def sum_over_ranks(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of what the ranks have, with gradients; a collective in forward and backward."""
    total: Tensor = _SumOverRanks.apply(part, group)
    return total
