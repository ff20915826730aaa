r"""The cut and the join of a sequence inside a model, and why gradients stay exact.

What all ranks together minimise is sum_w c_w * L_w, with the factors c_w of `loss.token_mean`, as a function of
parameters of which each rank has a copy. ZeRO adds up the gradients of the copies (and divides by W, which c_w holds),
and that is the gradient of this sum if every exchange between ranks has its adjoint for a backward:

- The cut takes a part; its backward puts zeros around it. What comes before it runs on the whole sequence on every
  rank, gets a part of its gradient on each, and the sum over ranks is all of it.
- The join hands every rank all slices; its backward adds up, over the ranks, what their losses ask of one slice.
  Without the sum a slice would get 1/P of its gradient, since behind the join every rank's loss is the whole loss L
  with 1/P of its weight: each of the P ranks has n / P of its n targets, so that c_w = (n / P) * W / N.

What comes after the join runs on every rank with 1/P of the weight, and the sum is all of it again.
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
    """(..., S, ...) -> (..., S_r, ...); its own memory, so that the whole can go."""
    span = layout.spans[rank]
    return tensor.narrow(dim, span.start, span.stop - span.start).contiguous()


def sum_slices(whole: Tensor, dim: int, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of this rank's slice of each rank's tensor: (..., S, ...) -> (..., S_r, ...)."""
    # (..., S, ...) -> (S, ...)
    send = whole.movedim(dim, 0).contiguous()
    received = send.new_empty(len(shares), shares[rank], *send.shape[1:])
    width = send[0].numel()
    dist.all_to_all_single(
        received.view(-1),
        send.view(-1),
        [shares[rank] * width] * len(shares),
        [share * width for share in shares],
        group=group,
    )
    # (P, S_r, ...) -> (S_r, ...) -> (..., S_r, ...)
    total = received.float().sum(dim=0).to(whole.dtype) if whole.dtype.itemsize < 4 else received.sum(dim=0)
    return total.movedim(0, dim)


class _Join(torch.autograd.Function):
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


def join(part: Tensor, dim: int, layout: SequenceLayout, rank: int, group: dist.ProcessGroup) -> Tensor:
    """(..., S_r, ...) -> (..., S, ...) on every rank, with gradients; a collective forward and backward."""
    whole: Tensor = _Join.apply(part, dim, layout.shares, rank, group)
    return whole
