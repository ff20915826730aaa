"""Exchange, attend, exchange for some heads of a rank at a time, so that one chunk of them exists and not all.

The forward keeps q, k, v and the output as they are on this rank, and of each chunk what its kernels returned besides,
such as the log-sum-exp. The backward exchanges a chunk's tensors again and runs the backward of its kernels.

Sources: DeepSpeed-Ulysses, arXiv 2309.14509; chunks of heads, and key/value heads that stay for their group, UPipe,
arXiv 2602.21196. The way the backward gets its tensors is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.attention.call import Meaning
from lightning_ulysses.attention.chunked_call import ChunkedCall
from lightning_ulysses.attention.ulysses import Exchange
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.exchange.some_heads import Wire
from lightning_ulysses.geometry.head_chunks import head_chunks, most_chunks


@dataclass
class HeadChunks:
    """A note on a run: in how many chunks each rank's heads are computed.

    Attributes:
        count: The number; ``"auto"`` for as many as there can be.
        overlaps: Whether the exchange of a chunk runs beside the attention of the one before it.
    """

    count: int | Literal["auto"] = 1
    overlaps: bool = False

    def of(self, num_heads: int, sp_size: int) -> int:
        """The number for an attention call.

        Args:
            num_heads: H.
            sp_size: Ranks that exchange heads, at most H.

        Raises:
            UlyssesError: If some rank has fewer heads.
        """
        most = most_chunks(num_heads, sp_size)
        if self.count == "auto":
            return most
        if self.count > most:
            raise too_many_chunks(self.count, num_heads, sp_size)
        return self.count


def too_many_chunks(count: int, num_heads: int, sp_size: int) -> UlyssesError:
    """For more chunks than a rank has heads."""
    most = most_chunks(num_heads, sp_size)
    return UlyssesError(
        f"head_chunks={count} for attention with {num_heads} query heads on {sp_size} ranks",
        f"at most {most}, the fewest heads of a rank, since every chunk has one or more on each rank",
        f"set head_chunks={most}, or 'auto'",
    )


class _Chunked(torch.autograd.Function):
    # q, k, v (B, heads, S_r, D) and learned tensors -> (B, H, S_r, D_v).
    @staticmethod
    def forward(ctx: Any, call: ChunkedCall, keeps: bool, *inputs: Tensor) -> Tensor:
        out, kept = call.first(inputs, keeps=keeps)
        if keeps:
            # All tensors by this way, so that checkpointing and offloading see them.
            ctx.save_for_backward(out, *inputs, *kept)
            ctx.call, ctx.num_inputs = call, len(inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out, *rest = ctx.saved_tensors
        return None, None, *ctx.call.gradients(rest[: ctx.num_inputs], out, rest[ctx.num_inputs :], grads[0])


def chunked_call(
    batch: LocalBatch, q: Tensor, k: Tensor, meaning: Meaning, mesh: SequenceMesh, chunks: HeadChunks
) -> ChunkedCall:
    """An attention call in chunks of each rank's heads.

    Args:
        batch: The batch that is split.
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D).
        meaning: The computation.
        mesh: Sizes and groups, of several ranks.
        chunks: How many.

    Raises:
        UlyssesError: If a length is not this rank's share, or for more chunks than a rank has heads.
    """
    exchange = Exchange.of(batch, q, k, meaning, mesh)
    grid = exchange.grid
    cut = head_chunks(q.shape[1], k.shape[1], grid.ulysses, chunks.of(q.shape[1], grid.ulysses))
    wire = Wire(exchange.shares, grid.inner, grid.heads_group, chunks.overlaps)
    return ChunkedCall(cut, wire, meaning, mesh, exchange.keys)


def exchanged_by_chunks(
    batch: LocalBatch, q: Tensor, k: Tensor, v: Tensor, meaning: Meaning, mesh: SequenceMesh, chunks: HeadChunks
) -> Tensor:
    """`ulysses.exchanged`, in chunks of each rank's heads; see `chunked_call`.

    Returns:
        (B, H, S_r, D_v).
    """
    call = chunked_call(batch, q, k, meaning, mesh, chunks)
    inputs = (q, k, v, *(meaning.learned or ()))
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    out: Tensor = _Chunked.apply(call, keeps, *inputs)
    return out
