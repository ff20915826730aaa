"""Exchange, attend, exchange for some heads of a rank at a time, so that one chunk of them exists and not all.

The forward keeps q, k, v and the output as they are on this rank, and of each chunk what its kernels returned besides,
such as the log-sum-exp. The backward exchanges a chunk's tensors again and runs the backward of its kernels.

Sources: DeepSpeed-Ulysses, arXiv 2309.14509; chunks of heads, and key/value heads that stay for their group, UPipe,
arXiv 2602.21196. The way the backward gets its tensors is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.attention.call import Meaning
from lightning_ulysses.attention.repeated import Trace, run
from lightning_ulysses.attention.ulysses import check_shares, exchanged
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.exchange.some_heads import Wire, begin_gather, begin_scatter
from lightning_ulysses.geometry.head_chunks import HeadChunk, head_chunks, most_chunks

T = TypeVar("T")


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
            sp_size: P, at most H.

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
        f"at most {most}, since each rank has {most} or more heads and each chunk at least one",
        f"set head_chunks={most}, or 'auto'",
    )


def _stored_by_token(like: Tensor, heads: int, size: int) -> Tensor:
    """An empty (B, heads, S_r, D) in the order (B, S_r, heads, D), in which models use it next."""
    batch, _, share, _ = like.shape
    return like.new_empty(batch, share, heads, size).transpose(1, 2)


def _arriving(begin: Callable[[int], Callable[[], T]], count: int, overlaps: bool) -> Iterator[T]:
    """What was begun for each number, in order. With ``overlaps``, the next one is begun before one is used."""
    coming: Callable[[], T] | None = begin(0)
    for number in range(count):
        assert coming is not None
        # Not in a variable, which would hold it while the caller computes.
        arrived = [coming()]
        coming = begin(number + 1) if overlaps and number + 1 < count else None
        yield arrived.pop()
        if coming is None and number + 1 < count:
            coming = begin(number + 1)


class _HeldHeads:
    """The key/value head that the next chunk needs as well."""

    def __init__(self) -> None:
        self._heads: list[Tensor] = []

    def add(self, new: Sequence[Tensor], num_done: int) -> list[Tensor]:
        """The heads of a chunk, from those of earlier ones and those that came.

        Args:
            new: k and v, each (B, new heads, S, D).
            num_done: How many of the chunk's heads no later chunk needs.

        Returns:
            k and v, each (B, heads, S, D).
        """
        whole = list(new)
        if self._heads:
            pairs = zip(self._heads, new, strict=True)
            whole = [torch.cat([held, part], dim=1) if part.shape[1] else held for held, part in pairs]
        rest = whole[0].shape[1] - num_done
        # A copy of one head, where a view would hold several.
        self._heads = [part if num_done == 0 else part[:, num_done:].clone() for part in whole] if rest else []
        return whole


class _HeldGradients:
    """The gradient of the key/value head that the next chunk needs as well, in float32 or better."""

    def __init__(self) -> None:
        self._heads: list[Tensor] = []

    def add(self, grads: Sequence[Tensor], num_done: int) -> list[Tensor]:
        """The gradients of heads that no later chunk needs.

        Args:
            grads: Of a chunk's k and v, each (B, heads, S, D).
            num_done: How many of these heads no later chunk needs.

        Returns:
            Each (B, done heads, S, D).
        """
        rest = grads[0].shape[1] - num_done
        held, self._heads = self._heads, []
        done = []
        for number, grad in enumerate(grads):
            parts = [grad[:, :num_done]]
            if held:
                # The held head is the first of this chunk.
                held[number].add_(grad[:, :1])
                if num_done:
                    parts = [held[number].to(grad.dtype), grad[:, 1:num_done]]
            if rest:
                is_first = bool(held) and num_done == 0
                self._heads.append(held[number] if is_first else _wide_copy(grad[:, num_done:]))
            done.append(torch.cat(parts, dim=1) if len(parts) > 1 and parts[1].shape[1] else parts[0])
        return done


def _wide_copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


@dataclass(frozen=True)
class _Call:
    """One attention call.

    Args:
        chunks: Of all ranks.
        wire: Between whom heads travel.
        meaning: The computation.
        mesh: Sizes and ranks.
        keeps: Whether a backward may follow.
    """

    chunks: tuple[HeadChunk, ...]
    wire: Wire
    meaning: Meaning
    mesh: SequenceMesh
    keeps: bool

    def computation(self, chunk: HeadChunk) -> Callable[..., Tensor]:
        """Attention for a chunk on this rank, of q, k, v and the learned tensors."""
        rank = self.wire.rank
        heads, groups = slice(*chunk.query_ranges[rank]), chunk.uneven_groups[rank]

        def compute(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
            meaning = self.meaning if self.meaning.learned is None else self.meaning.given(learned)
            return meaning.attend(q, k, v, heads, groups, self.mesh)

        return compute

    def num_done(self, chunk: HeadChunk) -> int:
        """How many key/value heads of a chunk no later chunk of this rank needs."""
        first, last = chunk.done_ranges[self.wire.rank]
        return last - first

    def arriving(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Fetches the tensors of each chunk, in order.

        Yields:
            Its new k and v; its q and its part of each of ``more``, which have as many heads.
        """

        def begin(number: int) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
            chunk = self.chunks[number]
            keys = begin_scatter((k, v), chunk.new_ranges, self.wire)
            # Each in a buffer of its own, so that it lies in memory as a kernel would return it.
            queries = [begin_scatter((tensor,), chunk.query_ranges, self.wire) for tensor in (q, *more)]
            return lambda: ([*keys()], [part for end in queries for part in end()])

        return _arriving(begin, len(self.chunks), self.wire.overlaps)


def _attend_chunk(call: _Call, chunk: HeadChunk, inputs: list[Tensor]) -> tuple[Tensor, Trace | None, list[Tensor]]:
    compute = call.computation(chunk)
    if not call.keeps:
        return compute(*inputs), None, []
    return run(compute, [tensor.detach() for tensor in inputs], is_hidden=call.meaning.learned is None)


def _forward(
    call: _Call, q: Tensor, k: Tensor, v: Tensor, learned: tuple[Tensor, ...]
) -> tuple[Tensor, list[Trace | None], list[list[Tensor]]]:
    """The output (B, H, S_r, D_v), and for each chunk how to repeat it and what to keep for that."""
    out = _stored_by_token(q, q.shape[1], v.shape[3])
    held = _HeldHeads()
    traces: list[Trace | None] = []
    kept: list[list[Tensor]] = []
    place: Callable[[], None] | None = None
    # Not zipped with the chunks: `zip` holds what it has returned.
    for new, (q_part,) in call.arriving(q, k, v):
        chunk = call.chunks[len(traces)]
        inputs = [q_part, *held.add(new, call.num_done(chunk)), *learned]
        del new, q_part
        part, trace, tensors = _attend_chunk(call, chunk, inputs)
        traces.append(trace)
        kept.append(tensors)
        del inputs
        if place is not None:
            place()
        place = begin_gather(part, chunk.query_ranges, out, call.wire)
        del part, tensors
    if place is not None:
        place()
    return out, traces, kept


def _backward(
    call: _Call,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    learned: tuple[Tensor, ...],
    traces: list[Trace],
    kept: list[list[Tensor]],
    grad: Tensor,
) -> list[Tensor | None]:
    """The gradients of q, k, v and the learned tensors.

    Args:
        call: The call.
        saved: q, k, v and the output, as they are on this rank.
        learned: Further tensors that need gradients.
        traces: Of each chunk.
        kept: Of each chunk.
        grad: That of the output, (B, H, S_r, D_v).
    """
    q, k, v, out = saved
    d_q = _stored_by_token(q, q.shape[1], q.shape[3])
    d_keys = [_stored_by_token(tensor, tensor.shape[1], tensor.shape[3]).zero_() for tensor in (k, v)]
    sums: list[Tensor | None] = [None] * len(learned)
    held, held_grads = _HeldHeads(), _HeldGradients()
    places: list[Callable[[], None]] = []
    rest = [*zip(call.chunks, traces, kept, strict=True)]
    for new, parts in call.arriving(q, k, v, out, grad):
        chunk, trace, tensors = rest.pop(0)
        num_done = call.num_done(chunk)
        grads = _chunk_gradients(call, chunk, trace, tensors, held.add(new, num_done), parts, learned)
        del new, parts
        for place in places:
            place()
        sums = [more if total is None else total + more for total, more in zip(sums, grads[3:], strict=True)]
        done = held_grads.add(grads[1:3], num_done)
        places = [begin_gather(grads[0], chunk.query_ranges, d_q, call.wire)]
        del grads
        places += [begin_gather(done.pop(0), chunk.done_ranges, whole, call.wire, adds=True) for whole in d_keys]
    for place in places:
        place()
    return [d_q, *d_keys, *sums]


def _chunk_gradients(
    call: _Call,
    chunk: HeadChunk,
    trace: Trace,
    kept: list[Tensor],
    keys: list[Tensor],
    parts: list[Tensor],
    learned: tuple[Tensor, ...],
) -> list[Tensor]:
    """The gradients of a chunk's q, k, v and of the learned tensors.

    Args:
        call: The call.
        chunk: The chunk.
        trace: Of its forward.
        kept: Of its forward.
        keys: Its k and v, each (B, heads, S, D).
        parts: Its q, output and gradient of the output, each (B, H_c, S, D). Emptied.
        learned: Further tensors that need gradients.
    """
    grad, out, q = parts.pop(), parts.pop(), parts.pop()
    inputs = [tensor.detach().requires_grad_() for tensor in (q, *keys, *learned)]
    result = trace.repeat(call.computation(chunk), inputs, out, kept)
    del out, q
    return list(torch.autograd.grad(result, inputs, grad, allow_unused=True, materialize_grads=True))


class _Chunked(torch.autograd.Function):
    # q, k, v (B, heads, S_r, D) and learned tensors -> (B, H, S_r, D_v).
    @staticmethod
    def forward(ctx: Any, call: _Call, q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        out, traces, kept = _forward(call, q, k, v, learned)
        if call.keeps:
            # All tensors by this way, so that checkpointing and offloading see them.
            ctx.save_for_backward(q, k, v, out, *learned, *(tensor for tensors in kept for tensor in tensors))
            ctx.call, ctx.traces, ctx.num_learned = call, traces, len(learned)
            ctx.num_kept = [len(tensors) for tensors in kept]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, *rest = ctx.saved_tensors
        learned, rest = tuple(rest[: ctx.num_learned]), rest[ctx.num_learned :]
        kept = []
        for count in ctx.num_kept:
            kept.append(rest[:count])
            rest = rest[count:]
        return None, *_backward(ctx.call, (q, k, v, out), learned, ctx.traces, kept, grads[0])


def exchanged_by_chunks(
    batch: LocalBatch, q: Tensor, k: Tensor, v: Tensor, meaning: Meaning, mesh: SequenceMesh, chunks: HeadChunks
) -> Tensor:
    """`ulysses.exchanged`, in chunks of each rank's heads, where there are several ranks.

    Args:
        batch: The batch that is split.
        q: (B, H, S_r, D).
        k: (B, H_kv, S_r, D).
        v: (B, H_kv, S_r, D_v).
        meaning: The computation.
        mesh: Sizes and groups.
        chunks: How many.

    Returns:
        (B, H, S_r, D_v).

    Raises:
        UlyssesError: If a length is not this rank's share, P > H, or for more chunks than a rank has heads.
    """
    if mesh.sp_group is None:
        return exchanged(batch, q, k, v, meaning, mesh)
    check_shares(batch, q, k, mesh)
    count = chunks.of(q.shape[1], mesh.sp_size)
    learned = meaning.learned or ()
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, *learned))
    wire = Wire(batch.layout.shares, mesh.sp_rank, mesh.sp_group, chunks.overlaps)
    call = _Call(head_chunks(q.shape[1], k.shape[1], mesh.sp_size, count), wire, meaning, mesh, keeps)
    out: Tensor = _Chunked.apply(call, q, k, v, *learned)
    return out
