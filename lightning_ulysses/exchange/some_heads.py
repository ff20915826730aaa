"""The exchange of some heads of a tensor: what `all_to_all` does for all of them at once, for a part at a time.

What is sent is copied out of the whole tensor straight into the send buffer, and what is received straight to its place
in the whole result. An exchange may be left to run beside what follows: it is begun here and ended by the function that
is returned. Ranks must begin the same exchanges in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from lightning_ulysses.exchange.all_to_all import Ranges, on_wire, side_by_side


@dataclass(frozen=True)
class Wire:
    """Between whom heads travel, and how.

    Args:
        shares: S_r of every rank.
        rank: This process's rank in ``group``.
        group: The ranks that exchange heads; None for this one alone.
        overlaps: Whether an exchange runs beside what follows until it is ended. Otherwise it is waited for at once.
    """

    shares: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None
    overlaps: bool = False

    @property
    def peers(self) -> range:
        """The ranks whose chunks pass through a collective, see `on_wire`."""
        return on_wire(self.rank, len(self.shares))

    def begin(self, recv: Tensor, send: Tensor, recv_sizes: list[int], send_sizes: list[int]) -> Callable[[], object]:
        """Begins one all-to-all between flat tensors. The sizes are in elements, one for each rank.

        Returns:
            What waits for it. On a GPU it has the current stream wait, and not the host.
        """
        if self.group is None:
            return _nothing
        # The work keeps both tensors until it is waited for. On a GPU it runs on a stream of the group's own.
        work = dist.all_to_all_single(recv, send, recv_sizes, send_sizes, group=self.group, async_op=self.overlaps)
        return work.wait if work is not None else _nothing


def _nothing() -> None:
    pass


def _blocks(ends: Ranges, peers: range) -> Iterator[tuple[range, int]]:
    """Divides ``peers`` into blocks with equally long ranges of heads that begin at equal distances: (block, distance).

    Peers without a head are left out. A block of one peer has distance 0.
    """
    begin = peers.start
    while begin < peers.stop:
        first, last = ends[begin]
        stop, distance = begin + 1, 0
        while stop < peers.stop and ends[stop][1] - ends[stop][0] == last - first:
            step = ends[stop][0] - ends[stop - 1][0]
            # Ranges that overlap are blocks of their own, since their gradients are added one by one.
            if step < last - first or (stop > begin + 1 and step != distance):
                break
            stop, distance = stop + 1, step
        if last > first:
            yield range(begin, stop), distance
        begin = stop


def _heads_of_block(tensor: Tensor, ends: Ranges, block: range, distance: int) -> Tensor:
    """A view of the heads of some ranks: (B, heads, S_r, D) -> (ranks, S_r, B, heads of each, D)."""
    (begin, end), last = ends[block.start], ends[block.stop - 1][1]
    if len(block) == 1:
        # (B, heads, S_r, D) -> (S_r, B, heads of each, D) -> (1, S_r, B, heads of each, D)
        return tensor[:, begin:end].permute(2, 0, 1, 3).unsqueeze(0)
    # (B, heads, S_r, D) -> (B, ranks, S_r, D, heads of each) -> (ranks, S_r, B, heads of each, D)
    return tensor[:, begin:last].unfold(1, end - begin, distance).permute(1, 2, 0, 4, 3)


def _widths(ends: Ranges) -> list[int]:
    return [end - begin for begin, end in ends]


def _pack(send: Tensor, tensors: tuple[Tensor, ...], ends: Ranges, peers: range) -> None:
    """Copies the heads for each of ``peers`` into the flat send buffer, one peer after another."""
    batch, _, share, _ = tensors[0].shape
    sizes = [tensor.shape[3] for tensor in tensors]
    place = 0
    for block, distance in _blocks(ends, peers):
        width = ends[block.start][1] - ends[block.start][0]
        row = width * sum(sizes)
        count = len(block) * share * batch * row
        # (elements,) -> (ranks * S_r, B, sum of heads * D) -> each (ranks * S_r, B, heads, D)
        rows = send[place : place + count].view(len(block) * share, batch, row)
        for column, tensor in zip(side_by_side(rows, [width] * len(sizes), sizes), tensors, strict=True):
            # (ranks * S_r, B, heads, D) -> (ranks, S_r, B, heads, D)
            column.unflatten(0, (len(block), share)).copy_(_heads_of_block(tensor, ends, block, distance))
        place += count


def begin_scatter(tensors: tuple[Tensor, ...], ends: Ranges, wire: Wire) -> Callable[[], tuple[Tensor, ...]]:
    """Begins to give each rank its heads of the whole sequence, in one all-to-all.

    Args:
        tensors: Each (B, heads, S_r, D). Head sizes D may differ.
        ends: The heads of each rank. If no rank has any, nothing is sent.
        wire: Between whom.

    Returns:
        What ends the exchange and returns each (B, heads of this rank, S, D), strided views of one buffer.
    """
    batch, share, rank, peers = tensors[0].shape[0], wire.shares[wire.rank], wire.rank, wire.peers
    sizes, widths = [tensor.shape[3] for tensor in tensors], _widths(ends)
    whole = tensors[0].new_empty(sum(wire.shares), batch, widths[rank] * sum(sizes))
    wait: Callable[[], object] = _nothing
    if any(widths):
        chunks = whole.split(wire.shares)
        # Size 0 leaves the own chunk out of the collective.
        send_sizes = [share * batch * width * sum(sizes) * (peer in peers) for peer, width in enumerate(widths)]
        send = whole.new_empty(sum(send_sizes))
        _pack(send, tensors, ends, peers)
        begin = sum(wire.shares[: peers.start])
        # The part of the result that the collective fills: contiguous, since `whole` is sequence-major.
        recv = whole[begin : begin + sum(wire.shares[peer] for peer in peers)]
        recv_sizes = [chunk.numel() * (peer in peers) for peer, chunk in enumerate(chunks)]
        wait = wire.begin(recv.view(-1), send, recv_sizes, send_sizes)
        if rank not in peers:
            # The own chunk is copied directly into its place in the result.
            _pack(chunks[rank].view(-1), tensors, ends, range(rank, rank + 1))
    # (S, B, sum of heads * D) -> each (S, B, heads, D) -> (B, heads, S, D)
    parts = tuple(part.permute(1, 2, 0, 3) for part in side_by_side(whole, [widths[rank]] * len(sizes), sizes))

    def end() -> tuple[Tensor, ...]:
        wait()
        return parts

    return end


def begin_gather(part: Tensor, ends: Ranges, whole: Tensor, wire: Wire, *, adds: bool = False) -> Callable[[], None]:
    """Begins to send the heads of this rank to where their tokens are, in one all-to-all: the adjoint of a scatter.

    Args:
        part: (B, heads of this rank, S, D). Sent without a copy if S is first in memory.
        ends: The heads of each rank.
        whole: (B, heads, S_r, D), of which these heads are filled. Others stay as they are.
        wire: Between whom.
        adds: Whether heads are added to what ``whole`` holds, since several ranks may have the same.

    Returns:
        What ends the exchange; ``whole`` is not to be read before. Without overlap it has ended already.
    """
    batch, share, rank, peers = part.shape[0], wire.shares[wire.rank], wire.rank, wire.peers
    size, widths = part.shape[3], _widths(ends)
    if not any(widths):
        return _nothing
    begin = sum(wire.shares[: peers.start])
    tokens = part.permute(2, 0, 1, 3)
    # (S, B, heads, D) -> (tokens of the peers, B, heads, D)
    send = tokens[begin : begin + sum(wire.shares[peer] for peer in peers)].contiguous()
    send_sizes = [count * batch * widths[rank] * size * (peer in peers) for peer, count in enumerate(wire.shares)]
    recv_sizes = [share * batch * width * size * (peer in peers) for peer, width in enumerate(widths)]
    recv = send.new_empty(sum(recv_sizes))
    wait = wire.begin(recv, send.view(-1), recv_sizes, send_sizes)
    if rank not in peers:
        # (S, B, heads, D) -> (S_r, B, heads, D) -> (elements,)
        own = tokens.split(wire.shares)[rank].reshape(-1)
        _unpack(whole, own, ends, range(rank, rank + 1), adds)

    def end() -> None:
        wait()
        _unpack(whole, recv, ends, peers, adds)

    if wire.overlaps:
        return end
    end()
    return _nothing


def _unpack(whole: Tensor, received: Tensor, ends: Ranges, peers: range, adds: bool) -> None:
    """Copies or adds flat chunks (S_r, B, heads, D) of ``peers`` to their heads in ``whole`` (B, heads, S_r, D)."""
    batch, _, share, size = whole.shape
    place = 0
    for block, distance in _blocks(ends, peers):
        width = ends[block.start][1] - ends[block.start][0]
        count = len(block) * share * batch * width * size
        # (elements,) -> (ranks, S_r, B, heads, D)
        held = received[place : place + count].view(len(block), share, batch, width, size)
        target = _heads_of_block(whole, ends, block, distance)
        if adds:
            target.add_(held)
        else:
            target.copy_(held)
        place += count
