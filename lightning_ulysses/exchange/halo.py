"""Gets a rank the tokens beside its slice, from as many neighbours as hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Span = tuple[int, int]


@dataclass(frozen=True)
class Fetch:
    """Who holds which tokens, and who wants which.

    Attributes:
        edges: Where the slice of each rank begins, and the end of the last one.
        wanted: For each rank the tokens that it wants, its own among them.
        rank: Of this process in the group.
        group: The group.
    """

    edges: tuple[int, ...]
    wanted: tuple[Span, ...]
    rank: int
    group: dist.ProcessGroup

    @property
    def held(self) -> tuple[Span, ...]:
        """For each rank the tokens that it holds."""
        return tuple(pairwise(self.edges))

    def sent(self) -> list[Span]:
        """For each rank the tokens of this one that it wants."""
        return [_both(self.held[self.rank], span) for span in self.wanted]

    def received(self) -> list[Span]:
        """For each rank its tokens that this one wants."""
        return [_both(span, self.wanted[self.rank]) for span in self.held]

    def exchange(self, parts: list[Tensor], shapes: list[int]) -> list[Tensor]:
        """Sends each rank its part (n, ...), and receives parts of so many tokens; this rank's own one stays here."""
        like, own = parts[self.rank], parts[self.rank]
        width = math.prod(like.shape[1:])
        sent = [like[:0] if rank == self.rank else part for rank, part in enumerate(parts)]
        counts = [part.shape[0] * width for part in sent]
        sizes = [0 if rank == self.rank else tokens * width for rank, tokens in enumerate(shapes)]
        # Each (n, ...) -> (elements,)
        send = torch.cat([part.reshape(-1) for part in sent])
        got = like.new_empty(sum(sizes))
        dist.all_to_all_single(got, send, sizes, counts, group=self.group)
        # (elements,) -> (n, ...) of each rank
        found = [piece.unflatten(0, (-1, *like.shape[1:])) for piece in got.split(sizes)]
        return [own if rank == self.rank else piece for rank, piece in enumerate(found)]


def _both(one: Span, other: Span) -> Span:
    begin, end = max(one[0], other[0]), min(one[1], other[1])
    return (begin, max(begin, end))


class _Fetched(torch.autograd.Function):
    # Tokens travel to who wants them; the backward is the adjoint, gradients travel back and are added up.
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, fetch: Fetch) -> Tensor:
        ctx.dim, ctx.fetch = dim, fetch
        begin = fetch.edges[fetch.rank]
        # (..., S_r, ...) -> (S_r, ...)
        tokens = part.movedim(dim, 0)
        parts = [tokens[first - begin : last - begin] for first, last in fetch.sent()]
        pieces = fetch.exchange(parts, [last - first for first, last in fetch.received()])
        # Each (n, ...) -> (..., n, ...) -> (..., wanted, ...)
        return torch.cat([piece.movedim(0, dim) for piece in pieces], dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        fetch, begin = ctx.fetch, ctx.fetch.edges[ctx.fetch.rank]
        # (..., wanted, ...) -> (wanted, ...) -> (n, ...) of each rank
        parts = list(grads[0].movedim(ctx.dim, 0).split([last - first for first, last in fetch.received()]))
        spans = fetch.sent()
        pieces = fetch.exchange(parts, [last - first for first, last in spans])
        # A rank sees all of its own tokens.
        total = pieces[fetch.rank].clone()
        for rank, (piece, (first, last)) in enumerate(zip(pieces, spans, strict=True)):
            if rank != fetch.rank:
                total[first - begin : last - begin] += piece
        # (S_r, ...) -> (..., S_r, ...)
        return total.movedim(0, ctx.dim), None, None


def fetched(part: Tensor, dim: int, fetch: Fetch) -> Tensor:
    """(..., S_r, ...) -> (..., wanted, ...), with gradients; a collective in forward and backward.

    Args:
        part: This rank's slice.
        dim: The dimension that carries the sequence.
        fetch: Who holds and wants which tokens.
    """
    whole: Tensor = _Fetched.apply(part, dim, fetch)
    return whole
