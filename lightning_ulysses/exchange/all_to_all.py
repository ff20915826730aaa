"""The Ulysses exchange: slices of the sequence with all heads <-> the whole sequence for a share of the heads.

Each direction is one all-to-all, forward and backward, on gloo and NCCL. Only large gradients of q, k and v are sent
one by one. In the buffers that are sent, every chunk is sequence-major: ``(S_i, B, heads, D)``. The chunks of all ranks
one after another are then the whole sequence. So the receiving side of `seq_to_heads` and the sending side of
`heads_to_seq` copy nothing.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Fusing q, k and v and uneven splits are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.geometry.heads import HeadLayout

# For each rank its heads of one tensor, as (first, last + 1).
Ranges = tuple[tuple[int, int], ...]

# From this many bytes per rank on, the gradients of q, k and v are sent one by one, without a copy into one buffer. On
# gloo, one fused all-to-all is 1.2 times as fast at 3 MiB, as fast at 6, and 1.2 times as slow at 12.
_BULKY = 8 * 2**20


def _widths(ranges: tuple[Ranges, ...], rank: int) -> list[int]:
    """For each tensor the number of heads that ``rank`` gets."""
    return [ends[rank][1] - ends[rank][0] for ends in ranges]


def _row_sizes(ranges: tuple[Ranges, ...], sizes: list[int]) -> list[int]:
    """For each rank the elements of one token in all tensors together. ``sizes`` are the head sizes."""
    return [
        sum(width * size for width, size in zip(_widths(ranges, rank), sizes, strict=True))
        for rank in range(len(ranges[0]))
    ]


def _sharers(ranges: Ranges, total: int) -> int:
    """How many consecutive ranks share each range, if all ranges are equally long and tile the heads; else 0.

    Example:
        16 ranks with 8 key/value heads: 2 ranks share each. 8 ranks with 32 query heads: 1.
    """
    width = ranges[0][1]
    sharers = width * len(ranges) // total
    tiled = sharers and ranges == tuple((r // sharers * width, (r // sharers + 1) * width) for r in range(len(ranges)))
    return sharers if tiled else 0


def _blocks(peers: range, sharers: int) -> Iterator[tuple[range, int]]:
    """Divides ``peers`` into few blocks in which each range of heads has equally many sharers: (peers, sharers)."""
    # The first and the last range may have lost the rank that is not on the wire.
    begin = min(-(-peers.start // sharers) * sharers, peers.stop)
    end = max(peers.stop // sharers * sharers, begin)
    for block, count in ((range(peers.start, begin), begin - peers.start), (range(begin, end), sharers)):
        if block:
            yield block, count
    if end < peers.stop:
        yield range(end, peers.stop), peers.stop - end


def on_wire(rank: int, sp_size: int) -> range:
    """The peers whose chunks pass through the collective of ``rank``.

    The rank's own chunk is left out if the chunks of the others are contiguous without it. This saves two copies of it.
    """
    # Without its own chunk, memory is contiguous only for the first and the last rank.
    return range(int(rank == 0), sp_size - int(rank == sp_size - 1))


def side_by_side(rows: Tensor, widths: list[int], sizes: list[int]) -> list[Tensor]:
    """Views of the tensors side by side in ``rows``: (tokens, B, sum of heads * D) -> each (tokens, B, heads, D)."""
    # (tokens, B, sum of heads * D) -> each (tokens, B, heads * D) -> (tokens, B, heads, D)
    parts = rows.split([width * size for width, size in zip(widths, sizes, strict=True)], dim=2)
    return [part.unflatten(2, (width, size)) for part, width, size in zip(parts, widths, sizes, strict=True)]


def _exchange(
    recv: Tensor, send: Tensor, recv_sizes: list[int], send_sizes: list[int], group: dist.ProcessGroup
) -> None:
    """One all-to-all between contiguous tensors. The sizes are in elements, one for each rank."""
    # (...) -> (elements,)
    dist.all_to_all_single(recv.view(-1), send.view(-1), recv_sizes, send_sizes, group=group)


def _pack_heads(send: Tensor, tensors: tuple[Tensor, ...], ranges: tuple[Ranges, ...], peers: range) -> None:
    """Copies the heads for each of ``peers`` into the send buffer, one peer after another.

    Args:
        send: The flat buffer. For each peer it takes (S_r, B, sum of heads * D).
        tensors: Each (B, heads, S_r, D). Head sizes D may differ.
        ranges: For each tensor the heads of each rank.
        peers: The ranks to send to.
    """
    batch, _, share, _ = tensors[0].shape
    sizes = [tensor.shape[3] for tensor in tensors]
    # The common case: one copy for each tensor, or a few, instead of one for each tensor and peer.
    sharers = [_sharers(ends, tensor.shape[1]) for ends, tensor in zip(ranges, tensors, strict=True)]
    if all(sharers):
        widths = _widths(ranges, 0)
        # (elements,) -> (peers * S_r, B, sum of heads * D) -> each (peers * S_r, B, heads, D)
        columns = side_by_side(send.view(len(peers) * share, batch, -1), widths, sizes)
        for column, tensor, width, shared in zip(columns, tensors, widths, sharers, strict=True):
            for block, count in _blocks(peers, shared):
                # (peers * S_r, B, heads, D) -> (block * S_r, B, heads, D)
                part = column[(block.start - peers.start) * share : (block.stop - peers.start) * share]
                heads = tensor[:, block.start // shared * width :][:, : len(block) // count * width]
                # (B, ranges * heads, S_r, D) -> (B, ranges, heads, S_r, D) -> (ranges, S_r, B, heads, D)
                heads = heads.unflatten(1, (len(block) // count, width)).permute(1, 3, 0, 2, 4)
                # (block * S_r, B, heads, D) -> (ranges, sharers, S_r, B, heads, D)
                part.unflatten(0, (len(block) // count, count, share)).copy_(heads.unsqueeze(1))
        return
    rows = _row_sizes(ranges, sizes)
    for peer, chunk in zip(peers, send.split([share * batch * rows[peer] for peer in peers]), strict=True):
        # (elements,) -> (S_r, B, sum of heads * D) -> each (S_r, B, heads, D)
        columns = side_by_side(chunk.view(share, batch, rows[peer]), _widths(ranges, peer), sizes)
        for column, tensor, ends in zip(columns, tensors, ranges, strict=True):
            # (B, heads, S_r, D) -> (S_r, B, heads, D)
            column.copy_(tensor[:, slice(*ends[peer])].permute(2, 0, 1, 3))


def scatter_heads(
    tensors: tuple[Tensor, ...],
    ranges: tuple[Ranges, ...],
    shares: tuple[int, ...],
    rank: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """Each tensor (B, heads, S_r, D) -> (B, heads of this rank, S, D), in one all-to-all."""
    batch, share = tensors[0].shape[0], shares[rank]
    sizes = [tensor.shape[3] for tensor in tensors]
    rows = _row_sizes(ranges, sizes)
    peers = on_wire(rank, len(shares))
    # Size 0 leaves the own chunk out of the collective, see `on_wire`.
    send_sizes = [share * batch * row * (peer in peers) for peer, row in enumerate(rows)]
    send = tensors[0].new_empty(sum(send_sizes))
    _pack_heads(send, tensors, ranges, peers)
    whole = tensors[0].new_empty(sum(shares), batch, rows[rank])
    chunks = whole.split(shares)
    # The part of the result that the collective fills: contiguous, since `whole` is sequence-major.
    begin = sum(shares[: peers.start])
    recv = whole[begin : begin + sum(shares[peer] for peer in peers)]
    recv_sizes = [chunk.numel() * (peer in peers) for peer, chunk in enumerate(chunks)]
    _exchange(recv, send, recv_sizes, send_sizes, group)
    # The own chunk is copied directly into its place in the result.
    if rank not in peers:
        # (S_r, B, sum of heads * D) -> (elements,)
        _pack_heads(chunks[rank].view(-1), tensors, ranges, range(rank, rank + 1))
    # (S, B, sum of heads * D) -> each (S, B, heads, D) -> (B, heads, S, D), views of the received buffer
    return tuple(column.permute(1, 2, 0, 3) for column in side_by_side(whole, _widths(ranges, rank), sizes))


def _place(whole: Tensor, received: Tensor, own: Tensor | None, rank: int, sharers: int) -> None:
    """Fills ``whole`` (S_r, B, all heads, D) from ranges of heads that are equally long, see `_sharers`.

    Args:
        whole: The result.
        received: (peers, S_r, B, heads, D), from all ranks or, with ``own``, from all others.
        own: (S_r, B, heads, D) of this rank.
        rank: This rank.
        sharers: Ranks that share each range. Theirs are summed.
    """
    parts = [(0, received)]
    if own is not None:
        parts = [(0, received[:rank]), (rank, own.unsqueeze(0)), (rank + 1, received[rank:])]
    # (S_r, B, all heads, D) -> (S_r, B, ranges, heads, D) -> (ranges, S_r, B, heads, D)
    target = whole.unflatten(2, (-1, received.shape[3])).permute(2, 0, 1, 3, 4)
    filled = 0
    for first, part in parts:
        for block, count in _blocks(range(first, first + len(part)), sharers):
            # (peers of the block, ...) -> (ranges, sharers, S_r, B, heads, D)
            held = part[block.start - first : block.stop - first].unflatten(0, (-1, count))
            begin = block.start // sharers
            place = target[begin : begin + len(held)]
            # The first of the sharers of a range fills it, and the others add to it.
            for sharer in range(count):
                if sharer == 0 and begin >= filled:
                    place.copy_(held[:, sharer])
                else:
                    place.add_(held[:, sharer])
            filled = begin + len(held)


def _join_heads(whole: Tensor, parts: list[Tensor], ends: Ranges) -> None:
    """Fills ``whole`` (S_r, B, all heads, D) from (S_r, B, heads, D) of each rank. Shared heads are summed."""
    filled = 0
    for (begin, end), part in zip(ends, parts, strict=True):
        # Ranges overlap where a key/value head was sent to several ranks: its gradient is the sum of theirs.
        shared = max(filled - begin, 0)
        if shared:
            whole[:, :, begin : begin + shared].add_(part[:, :, :shared])
        if begin + shared < end:
            whole[:, :, begin + shared : end].copy_(part[:, :, shared:])
        filled = max(filled, end)


def _pack_tokens(
    send: Tensor, tensors: tuple[Tensor, ...], widths: list[int], shares: tuple[int, ...], rank: int
) -> None:
    """Copies the tokens for all other ranks into the send buffer, one rank after another, tensors side by side.

    Args:
        send: The flat buffer. For each other rank i it takes (S_i, B, sum of heads * D).
        tensors: Each (B, heads of this rank, S, D).
        widths: Heads of each tensor.
        shares: S_r of every rank.
        rank: This rank, whose own tokens are left out.
    """
    sizes = [tensor.shape[3] for tensor in tensors]
    before, own = sum(shares[:rank]), shares[rank]
    # (elements,) -> (tokens of all others, B, sum of heads * D) -> each (tokens of all others, B, heads, D)
    width = sum(w * d for w, d in zip(widths, sizes, strict=True))
    rows = send.view(sum(shares) - own, tensors[0].shape[0], width)
    for column, tensor in zip(side_by_side(rows, widths, sizes), tensors, strict=True):
        # (B, heads, S, D) -> (S, B, heads, D)
        tokens = tensor.permute(2, 0, 1, 3)
        column[:before].copy_(tokens[:before])
        column[before:].copy_(tokens[before + own :])


def gather_heads(
    tensors: tuple[Tensor, ...],
    ranges: tuple[Ranges, ...],
    totals: tuple[int, ...],
    shares: tuple[int, ...],
    rank: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """Each tensor (B, heads of this rank, S, D) -> (B, all heads, S_r, D), in one all-to-all.

    Heads that several ranks hold are summed.
    """
    batch, share, sp_size = tensors[0].shape[0], shares[rank], len(shares)
    sizes = [tensor.shape[3] for tensor in tensors]
    rows, widths = _row_sizes(ranges, sizes), [_widths(ranges, peer) for peer in range(sp_size)]
    # A single tensor is sent from where it is, so its peers must be contiguous. Several tensors are copied side by side
    # in any case, so the own chunk can always be left out.
    peers = list(on_wire(rank, sp_size)) if len(tensors) == 1 else [peer for peer in range(sp_size) if peer != rank]
    send_sizes = [count * batch * rows[rank] * (peer in peers) for peer, count in enumerate(shares)]
    recv_sizes = [share * batch * row * (peer in peers) for peer, row in enumerate(rows)]
    if len(tensors) == 1:
        begin = sum(shares[: peers[0]])
        # (B, heads, S, D) -> (S, B, heads, D) -> (tokens of the peers, B, heads, D); no copy if S is first in memory
        send = tensors[0].permute(2, 0, 1, 3)[begin : begin + sum(shares[peer] for peer in peers)].contiguous()
    else:
        send = tensors[0].new_empty(sum(send_sizes))
        _pack_tokens(send, tensors, widths[rank], shares, rank)
    recv = send.new_empty(sum(recv_sizes))
    _exchange(recv, send, recv_sizes, send_sizes, group)
    # Now, and not beside the results. On a GPU, its memory is used again only after the exchange.
    del send
    # The own tokens, if they were not on the wire: each (B, heads, S, D) -> (S, B, heads, D) -> (S_r, B, heads, D)
    own = None if rank in peers else [tensor.permute(2, 0, 1, 3).split(shares)[rank] for tensor in tensors]
    wholes = [tensors[0].new_empty(share, batch, total, size) for total, size in zip(totals, sizes, strict=True)]
    sharers = [_sharers(ends, total) for ends, total in zip(ranges, totals, strict=True)]
    if all(sharers):
        # (elements,) -> (peers, S_r, B, sum of heads * D)
        received = recv.view(len(peers), share, batch, rows[rank])
        columns = received.split([width * size for width, size in zip(widths[rank], sizes, strict=True)], dim=3)
        for index, whole in enumerate(wholes):
            # (peers, S_r, B, heads * D) -> (peers, S_r, B, heads, D)
            part = columns[index].unflatten(3, (-1, sizes[index]))
            _place(whole, part, None if own is None else own[index], rank, sharers[index])
    else:
        parts = [
            # (elements,) -> (S_r, B, sum of heads * D) -> each (S_r, B, heads, D)
            side_by_side(chunk.view(share, batch, row), width, sizes)
            for peer, (chunk, row, width) in enumerate(zip(recv.split(recv_sizes), rows, widths, strict=True))
            # The own chunk is inserted below.
            if peer in peers
        ]
        if own is not None:
            parts.insert(rank, own)
        for index, whole in enumerate(wholes):
            _join_heads(whole, [part[index] for part in parts], ranges[index])
    # Each (S_r, B, heads, D) -> (B, heads, S_r, D)
    return tuple(whole.permute(1, 2, 0, 3) for whole in wholes)


def _is_bulky(tensors: tuple[Tensor, ...], totals: tuple[int, ...], shares: tuple[int, ...]) -> bool:
    """Whether one all-to-all for each tensor is better than copying the tensors into one buffer.

    Measured with gloo. On a GPU a collective of this size costs as much as its bytes, so that several take no longer,
    and without the buffer the peak of memory is lower.
    """
    # Computed from the whole sequence and all heads: ranks must agree on the number of collectives.
    token = sum(total * tensor.shape[3] for total, tensor in zip(totals, tensors, strict=True))
    return tensors[0].shape[0] * sum(shares) * token * tensors[0].element_size() > _BULKY * len(shares)


class _SeqToHeads(torch.autograd.Function):
    # Scatters heads and gathers tokens. The backward is the adjoint: it gathers heads and scatters tokens.
    @staticmethod
    def forward(
        ctx: Any,
        layout: HeadLayout,
        shares: tuple[int, ...],
        rank: int,
        group: dist.ProcessGroup,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        # The first of one or three tensors is q, the others are k and v.
        ctx.ranges = (*(layout.query_ranges for _ in tensors[: len(tensors) % 2]),)
        ctx.ranges += (*(layout.kv_ranges for _ in tensors[len(tensors) % 2 :]),)
        ctx.totals = tuple(tensor.shape[1] for tensor in tensors)
        ctx.shares, ctx.rank, ctx.group = shares, rank, group
        return scatter_heads(tensors, ctx.ranges, shares, rank, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        where = ctx.shares, ctx.rank, ctx.group
        if _is_bulky(grads, ctx.totals, ctx.shares):
            each = zip(grads, ctx.ranges, ctx.totals, strict=True)
            results = [gather_heads((grad,), (ends,), (total,), *where)[0] for grad, ends, total in each]
        else:
            results = [*gather_heads(grads, ctx.ranges, ctx.totals, *where)]
        return None, None, None, None, *results


class _HeadsToSeq(torch.autograd.Function):
    # The opposite direction. Its ranges tile the query heads, so no head is summed.
    @staticmethod
    def forward(
        ctx: Any, layout: HeadLayout, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup, out: Tensor
    ) -> Tensor:
        ctx.ranges, ctx.shares, ctx.rank, ctx.group = (layout.query_ranges,), shares, rank, group
        return gather_heads((out,), ctx.ranges, (layout.num_heads,), shares, rank, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, None, None, *scatter_heads((grad,), ctx.ranges, ctx.shares, ctx.rank, ctx.group)


def seq_to_heads(
    q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """One all-to-all that gives this rank the whole sequence for its share of the heads.

    Args:
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D).
        v: (B, H_kv, S_r, D_v).
        layout: Which rank gets which heads.
        shares: S_r of every rank.
        rank: This process's rank in ``group``.
        group: The sequence-parallel group.

    Returns:
        q (B, H_r, S, D), k (B, heads needed, S, D), v (B, heads needed, S, D_v). All are strided views of one buffer.
    """
    q, k, v = _SeqToHeads.apply(layout, shares, rank, group, q, k, v)
    return q, k, v


def heads_to_seq(
    out: Tensor, layout: HeadLayout, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup
) -> Tensor:
    """The exchange after attention, by one all-to-all: (B, H_r, S, D_v) -> (B, H, S_r, D_v)."""
    return _HeadsToSeq.apply(layout, shares, rank, group, out)


def keys_to_heads(
    k: Tensor, v: Tensor, layout: HeadLayout, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """That of keys and values of another sequence than the queries: (B, H_kv, S_r, D) -> (B, heads needed, S, D)."""
    k, v = _SeqToHeads.apply(layout, shares, rank, group, k, v)
    return k, v


def queries_to_heads(
    tensor: Tensor, layout: HeadLayout, shares: tuple[int, ...], rank: int, group: dist.ProcessGroup
) -> Tensor:
    """The opposite of `heads_to_seq`, by one all-to-all: (B, H, S_r, D) -> (B, H_r, S, D)."""
    (whole,) = _SeqToHeads.apply(layout, shares, rank, group, tensor)
    return whole
