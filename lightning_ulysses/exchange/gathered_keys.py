"""Keys and values of a run of tokens -> those of the whole sequence, over ranks that hold the same heads.

Queries stay few: a rank attends with those of its own run to all keys. Where later queries see more keys, ranks swap
half of their queries, so that all have the same to do (`geometry.query_runs`).

Sources: all-gathered keys and values, Llama 3 (arXiv 2407.21783, section 3.3.2), also for the pairs of parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.exchange.all_to_all import side_by_side
from lightning_ulysses.exchange.cut_and_join import sum_slices
from lightning_ulysses.exchange.gather import gather_single
from lightning_ulysses.geometry.query_runs import QueryRuns


@dataclass(frozen=True)
class GatheredKeys:
    """The exchanges over the ranks that hold the same heads. None of these functions has gradients.

    Args:
        queries: The tokens of each rank, and the queries with which it attends.
        rank: This process's rank in ``group``.
        group: The ranks.
    """

    queries: QueryRuns
    rank: int
    group: dist.ProcessGroup

    def all_tokens(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One all-gather: each (B, heads, tokens of this rank, D) -> (B, heads, S, D)."""
        lengths = self.queries.lengths
        batch, heads, length, _ = k.shape
        sizes = [k.shape[3], v.shape[3]]
        # Every rank sends as many tokens as the one with the most.
        mine = k.new_empty(max(lengths), batch, heads * sum(sizes))
        for column, tensor in zip(side_by_side(mine[:length], [heads] * 2, sizes), (k, v), strict=True):
            # (B, heads, tokens, D) -> (tokens, B, heads, D)
            column.copy_(tensor.permute(2, 0, 1, 3))
        # (R * tokens * B * heads * (D + D_v),) -> (R, tokens, B, heads * (D + D_v))
        everyone = gather_single(mine.view(-1), self.group).view(len(lengths), *mine.shape)
        if len({*lengths}) == 1:
            # (R, tokens, B, ...) -> (S, B, ...)
            whole = everyone.flatten(0, 1)
        else:
            whole = torch.cat([part[:length] for part, length in zip(everyone, lengths, strict=True)])
        # (S, B, heads * (D + D_v)) -> each (S, B, heads, D) -> (B, heads, S, D)
        k, v = (column.permute(1, 2, 0, 3) for column in side_by_side(whole, [heads] * 2, sizes))
        return k, v

    def own_tokens(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint, a reduce-scatter: each (B, heads, S, D) -> (B, heads, tokens of this rank, D), summed."""
        batch, heads, length, _ = k.shape
        sizes = [k.shape[3], v.shape[3]]
        whole = k.new_empty(length, batch, heads * sum(sizes))
        for column, tensor in zip(side_by_side(whole, [heads] * 2, sizes), (k, v), strict=True):
            # (B, heads, S, D) -> (S, B, heads, D)
            column.copy_(tensor.permute(2, 0, 1, 3))
        mine = sum_slices(whole, 0, self.queries.lengths, self.rank, self.group)
        # (tokens, B, heads * (D + D_v)) -> each (tokens, B, heads, D) -> (B, heads, tokens, D)
        k, v = (column.permute(1, 2, 0, 3) for column in side_by_side(mine, [heads] * 2, sizes))
        return k, v

    def swapped(self, tensor: Tensor) -> Tensor:
        """Gives each rank the queries with which it attends: (B, H, tokens of this rank, D) -> (B, H, S_q, D)."""
        if not self.queries.is_balanced:
            return tensor
        own = (2 * self.rank, 2 * self.rank + 1)
        return self._send(tensor, own, self.queries.taken(self.rank), to_taker=True)

    def swapped_back(self, tensor: Tensor) -> Tensor:
        """The adjoint, and the inverse: (B, H, S_q, D) -> (B, H, tokens of this rank, D)."""
        if not self.queries.is_balanced:
            return tensor
        own = (2 * self.rank, 2 * self.rank + 1)
        return self._send(tensor, self.queries.taken(self.rank), own, to_taker=False)

    def _send(self, tensor: Tensor, held: tuple[int, ...], wanted: tuple[int, ...], to_taker: bool) -> Tensor:
        """One all-to-all of two parts of tokens.

        Args:
            tensor: (B, H, tokens, D), the parts ``held``.
            held: Numbers of parts.
            wanted: Numbers of the parts that come.
            to_taker: Whether parts go to those who attend with them, and not to those whose tokens they are.
        """
        queries, ranks = self.queries, len(self.queries.lengths)

        def to(part: int) -> int:
            return queries.taker(part) if to_taker else part // 2

        def fro(part: int) -> int:
            return part // 2 if to_taker else queries.taker(part)

        batch, heads, _, size = tensor.shape
        row = batch * heads * size
        # (B, H, tokens, D) -> (tokens, B, H, D) -> each (tokens of a part, B, H, D)
        pieces = tensor.permute(2, 0, 1, 3).split([queries.parts[part] for part in held])
        # What goes to one rank lies together, in the order of ranks.
        order = sorted(range(2), key=lambda number: to(held[number]))
        send = torch.cat([pieces[number] for number in order])
        arrival = sorted(range(2), key=lambda number: fro(wanted[number]))
        lengths = [queries.parts[wanted[number]] for number in arrival]
        recv = send.new_empty(sum(lengths), batch, heads, size)
        send_sizes = [sum(queries.parts[part] * row for part in held if to(part) == peer) for peer in range(ranks)]
        recv_sizes = [sum(queries.parts[part] * row for part in wanted if fro(part) == peer) for peer in range(ranks)]
        # (tokens, B, H, D) -> (elements,)
        dist.all_to_all_single(recv.view(-1), send.view(-1), recv_sizes, send_sizes, group=self.group)
        if arrival[0] > arrival[1]:
            recv = torch.cat(recv.split(lengths)[::-1])
        # (tokens, B, H, D) -> (B, H, tokens, D)
        return recv.permute(1, 2, 0, 3)


class _ToAll(torch.autograd.Function):
    # One function of all three: where a rank's queries see no key, its keys have no other gradient, and the exchange
    # would be missing on this rank alone.
    @staticmethod
    def forward(ctx: Any, over: GatheredKeys, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.over = over
        queries = over.swapped(q)
        return (queries.view_as(queries), *over.all_tokens(k, v))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, ctx.over.swapped_back(grads[0]), *ctx.over.own_tokens(*grads[1:])


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, over: GatheredKeys, tensor: Tensor, back: bool) -> Tensor:
        ctx.over, ctx.back = over, back
        return over.swapped_back(tensor) if back else over.swapped(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, ctx.over.swapped(grads[0]) if ctx.back else ctx.over.swapped_back(grads[0]), None


def gather_keys(q: Tensor, k: Tensor, v: Tensor, over: GatheredKeys) -> tuple[Tensor, Tensor, Tensor]:
    """Queries with which this rank attends, and all keys and values; with gradients.

    Args:
        q: (B, H_r, tokens of this rank, D).
        k: (B, heads, tokens of this rank, D).
        v: (B, heads, tokens of this rank, D_v).
        over: The ranks that hold the same heads.

    Returns:
        q (B, H_r, S_q, D), k (B, heads, S, D), v (B, heads, S, D_v).
    """
    q, k, v = _ToAll.apply(over, q, k, v)
    return q, k, v


def return_queries(tensor: Tensor, over: GatheredKeys) -> Tensor:
    """From queries with which this rank attends to its own tokens, with gradients: (B, H_r, S_q, D) -> (..., D)."""
    if not over.queries.is_balanced:
        return tensor
    out: Tensor = _Swap.apply(over, tensor, True)
    return out


def take_queries(tensor: Tensor, over: GatheredKeys) -> Tensor:
    """The opposite of `return_queries`."""
    if not over.queries.is_balanced:
        return tensor
    out: Tensor = _Swap.apply(over, tensor, False)
    return out
