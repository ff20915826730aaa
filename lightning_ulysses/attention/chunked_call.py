"""The forward and the backward of one attention call, for some heads of each rank at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lightning_ulysses.attention.call import Meaning
from lightning_ulysses.attention.held_heads import HeldGradients, HeldHeads
from lightning_ulysses.attention.repeated import Trace, run
from lightning_ulysses.attention.ulysses import attend_runs
from lightning_ulysses.exchange.gathered_keys import GatheredKeys
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.exchange.some_heads import Wire, begin_gather, begin_scatter
from lightning_ulysses.geometry.head_chunks import HeadChunk

T = TypeVar("T")


def _stored_by_token(like: Tensor, size: int) -> Tensor:
    """An empty (B, heads, S_r, D) in the order (B, S_r, heads, D), in which models use it next."""
    batch, heads, share, _ = like.shape
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


def _add(sums: list[Tensor | None], terms: Sequence[Tensor]) -> list[Tensor | None]:
    return [term if total is None else total + term for total, term in zip(sums, terms, strict=True)]


@dataclass(frozen=True)
class ChunkedCall:
    """One attention call on one rank.

    Args:
        chunks: Of all ranks.
        wire: Between whom heads travel.
        meaning: The computation.
        mesh: Sizes and ranks.
        keys: Over the ranks that hold the same heads; None if there is one.
        traces: How to repeat each chunk, after `first`.
    """

    chunks: tuple[HeadChunk, ...]
    wire: Wire
    meaning: Meaning
    mesh: SequenceMesh
    keys: GatheredKeys | None = None
    traces: list[Trace] = field(default_factory=list)

    def computation(self, chunk: HeadChunk) -> Callable[..., Tensor]:
        """Attention for the heads of a chunk, of q, k, v and the learned tensors."""
        rank = self.wire.rank
        heads, groups = slice(*chunk.query_ranges[rank]), chunk.uneven_groups[rank]

        def compute(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
            return attend_runs(self.meaning.given(learned), q, k, v, heads, groups, self.mesh, self.keys)

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
            return lambda: (self._all_tokens(keys()), [self._swapped(part) for end in queries for part in end()])

        return _arriving(begin, len(self.chunks), self.wire.overlaps)

    def _all_tokens(self, new: tuple[Tensor, ...]) -> list[Tensor]:
        """Keys and values of new heads for all tokens: each (B, heads, tokens, D) -> (B, heads, S, D)."""
        # Ranks that hold the same heads agree on whether there are any.
        return [*(self.keys.all_tokens(*new) if self.keys is not None and new[0].shape[1] else new)]

    def _own_tokens(self, done: list[Tensor]) -> list[Tensor]:
        """The adjoint of `_all_tokens`."""
        if self.keys is None:
            return done
        if not done[0].shape[1]:
            # This rank has none, and takes part with as many tokens as those that have some.
            return [each[:, :, : sum(self.wire.shares)] for each in done]
        return [*self.keys.own_tokens(*done)]

    def _swapped(self, part: Tensor) -> Tensor:
        return part if self.keys is None else self.keys.swapped(part)

    def _swapped_back(self, part: Tensor) -> Tensor:
        return part if self.keys is None else self.keys.swapped_back(part)

    def first(self, inputs: Sequence[Tensor], *, keeps: bool) -> tuple[Tensor, list[Tensor]]:
        """The forward.

        Args:
            inputs: q (B, H, S_r, D), k and v (B, H_kv, S_r, D), and the learned tensors.
            keeps: Whether a backward may follow.

        Returns:
            The output (B, H, S_r, D_v), and what `gradients` needs besides it and the inputs.
        """
        q, k, v, *learned = inputs
        out = _stored_by_token(q, v.shape[3])
        held, kept = HeldHeads(), []
        rest = [*self.chunks]
        place: Callable[[], None] | None = None
        # Neither `zip` nor `enumerate` here: they hold what they have returned.
        for new, (q_part,) in self.arriving(q, k, v):
            chunk = rest.pop(0)
            parts = [q_part, *held.add(new, self.num_done(chunk)), *learned]
            del new, q_part
            part, tensors = self._attend(chunk, parts, keeps)
            del parts
            kept += tensors
            del tensors
            if place is not None:
                place()
            place = begin_gather(self._swapped_back(part), chunk.query_ranges, out, self.wire)
            del part
        if place is not None:
            place()
        return out, kept

    def _attend(self, chunk: HeadChunk, parts: list[Tensor], keeps: bool) -> tuple[Tensor, list[Tensor]]:
        if not keeps:
            return self.computation(chunk)(*parts), []
        detached = [tensor.detach() for tensor in parts]
        out, trace, kept = run(self.computation(chunk), detached, is_hidden=self.meaning.learned is None)
        self.traces.append(trace)
        return out, kept

    def gradients(
        self, inputs: Sequence[Tensor], out: Tensor, kept: Sequence[Tensor], grad: Tensor
    ) -> list[Tensor | None]:
        """The backward.

        Args:
            inputs: Those of `first`.
            out: What `first` returned.
            kept: What `first` returned.
            grad: The gradient of the output, (B, H, S_r, D_v).

        Returns:
            The gradients of the inputs.
        """
        q, k, v, *learned = inputs
        d_q = _stored_by_token(q, q.shape[3])
        d_keys: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(learned)
        held, held_grads = HeldHeads(), HeldGradients()
        rest = [*zip(self.chunks, self.traces, strict=True)]
        kept = [*kept]
        places: list[Callable[[], None]] = []
        for new, parts in self.arriving(q, k, v, out, grad):
            chunk, trace = rest.pop(0)
            inner, kept = kept[: trace.num_kept], kept[trace.num_kept :]
            num_done = self.num_done(chunk)
            grads = self._chunk_gradients(chunk, trace, inner, [*held.add(new, num_done), *learned], parts)
            del new, parts, inner
            for place in places:
                place()
            sums = _add(sums, grads[3:])
            done = self._own_tokens(held_grads.add(grads[1:3], num_done))
            places = [begin_gather(self._swapped_back(grads[0]), chunk.query_ranges, d_q, self.wire)]
            del grads
            if not d_keys and any(first < last for first, last in chunk.done_ranges):
                d_keys = [_stored_by_token(tensor, tensor.shape[3]).zero_() for tensor in (k, v)]
            places += [begin_gather(done.pop(0), chunk.done_ranges, whole, self.wire, adds=True) for whole in d_keys]
            del done
        for place in places:
            place()
        return [d_q, *d_keys, *sums]

    def _chunk_gradients(
        self, chunk: HeadChunk, trace: Trace, kept: list[Tensor], others: list[Tensor], parts: list[Tensor]
    ) -> list[Tensor]:
        """The gradients of a chunk's q, k, v and of the learned tensors.

        Args:
            chunk: The chunk.
            trace: Of its forward.
            kept: Of its forward.
            others: Its k and v, each (B, heads, S, D), and the learned tensors.
            parts: Its q, output and gradient of the output, each (B, H_c, S, D). Emptied.
        """
        grad, out, q = parts.pop(), parts.pop(), parts.pop()
        inputs = [tensor.detach().requires_grad_() for tensor in (q, *others)]
        result = trace.repeat(self.computation(chunk), inputs, out, kept)
        del out, q
        return list(torch.autograd.grad(result, inputs, grad, allow_unused=True, materialize_grads=True))
