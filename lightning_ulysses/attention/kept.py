"""Attention calls of a checkpointed block whose outputs are kept, so that they are computed once.

A block that is computed again gets the kept output, without attention and without its exchanges. The backward of the
call exchanges queries, keys, values and the output again, and builds the graph of the computation on them. Kernels do
not run for that: what they returned is kept, but for the output itself, which is part of the call's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.call import Meaning
from lightning_ulysses.attention.chunked_call import ChunkedCall
from lightning_ulysses.attention.device import is_gpu
from lightning_ulysses.attention.repeated import Trace, run
from lightning_ulysses.attention.ulysses import Exchange
from lightning_ulysses.context import LocalBatch
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.notes import version


class Keeper(Protocol):
    """Where kept tensors wait for the backward."""

    def keep(self, tensor: Tensor) -> Any:
        """What stands for a tensor."""

    def unpack(self, kept: Any) -> Tensor:
        """The tensor that it stands for."""


class OnDevice:
    """Leaves kept tensors where they are."""

    def keep(self, tensor: Tensor) -> Any:
        """See `Keeper`."""
        return tensor

    def unpack(self, kept: Any) -> Tensor:
        """See `Keeper`."""
        assert isinstance(kept, Tensor)
        return kept


@dataclass(frozen=True)
class _Draws:
    """States of random numbers, of the host and of a GPU."""

    device: torch.device
    host: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _Draws:
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def set(self) -> None:
        torch.set_rng_state(self.host)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


@dataclass
class _Work:
    """How to compute one attention call, and to build its graph later; without the tensors that are kept.

    Attributes:
        exchange: Of the call.
        meaning: The computation.
        trace: How to repeat it, after `first`.
        draws: The states of random numbers before and after the call, of the host and its device, if it has dropout.
    """

    exchange: Exchange
    meaning: Softmax
    trace: Trace | None = None
    draws: tuple[_Draws, _Draws] | None = None

    @property
    def has_kernels(self) -> bool:
        """Whether torch saw kernels, which do not run again."""
        return self.trace is not None and bool(self.trace.calls)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.exchange.attend(self.meaning, q, k, v)

    def first(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output (B, H, S_r, D_v), and what kernels returned besides."""
        before = _Draws.now(q.device) if self.meaning.dropout_p else None
        exchanged = [tensor.detach() for tensor in self.exchange.inputs(q, k, v)]
        out, self.trace, kept = run(self._attend, exchanged)
        self.draws = None if before is None else (before, _Draws.now(q.device))
        return self.exchange.output(out), kept

    def gradients(
        self, inputs: Sequence[Tensor], out: Tensor, kept: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of queries, keys and values (B, heads, S_r, D)."""
        assert self.trace is not None
        leaves = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(inputs, needed, strict=True)]
        # (B, H, S_r, D_v) -> (B, H_r, S, D_v); always, since all ranks exchange together
        whole = self.exchange.adjoint(out)
        with torch.enable_grad(), self._drawing():
            found = self.trace.repeat(self._attend, self.exchange.inputs(*leaves), whole, kept)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        given = iter(torch.autograd.grad(found, wanted, self.exchange.adjoint(gradient), allow_unused=True))
        return [next(given) if needs else None for needs in needed]

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        if self.draws is None:
            yield
            return
        before, now = self.draws[0], _Draws.now(self.draws[0].device)
        before.set()
        try:
            yield
        finally:
            now.set()


@dataclass
class _ChunkedWork:
    """The same as `_Work` for a call in chunks of heads.

    Attributes:
        parts: The call.
        meaning: The computation.
        draws: See `_Work`.
    """

    parts: ChunkedCall
    meaning: Softmax
    draws: tuple[_Draws, _Draws] | None = None

    @property
    def has_kernels(self) -> bool:
        """See `_Work`."""
        return any(trace.calls for trace in self.parts.traces)

    def first(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output (B, H, S_r, D_v), and what kernels returned besides."""
        before = _Draws.now(q.device) if self.meaning.dropout_p else None
        out, kept = self.parts.first((q, k, v), keeps=True)
        self.draws = None if before is None else (before, _Draws.now(q.device))
        return out, kept

    def gradients(
        self, inputs: Sequence[Tensor], out: Tensor, kept: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of queries, keys and values (B, heads, S_r, D)."""
        found = self.parts.gradients(inputs, out, kept, gradient)
        return [grad if needs else None for grad, needs in zip(found, needed, strict=True)]


@dataclass
class _Entry:
    """One attention call of a block."""

    work: _Work | _ChunkedWork
    out: Any
    kept: list[Any]
    version: int


class Ledger:
    """The attention calls of one call of a block, in their order.

    Args:
        keeper: Where outputs wait.
        note: Called with the reason for each call that is computed twice after all.

    Attributes:
        note: The same.
    """

    def __init__(self, keeper: Keeper, note: Callable[[str], None]) -> None:
        self._keeper = keeper
        self.note = note
        self._entries: list[_Entry] = []
        # The next entry, while the block is computed again.
        self._next: int | None = None

    def rewind(self) -> None:
        """The block is computed again."""
        self._next = 0

    def takes(self, call: Sequence[Tensor], meaning: Meaning) -> bool:
        """Whether the output of a call is kept; the same on all ranks, which exchange together."""
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in call):
            return False
        reason = _reason(meaning, call[0])
        if reason is not None:
            self.note(reason)
        return reason is None

    def answer(
        self,
        batch: LocalBatch,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        meaning: Meaning,
        mesh: SequenceMesh,
        parts: ChunkedCall | None = None,
    ) -> Tensor:
        """What `exchanged` returns, computed at first and kept from then on; in chunks of heads if there are any."""
        # As `takes` has seen.
        assert isinstance(meaning, Softmax)
        work = (
            _Work(Exchange.of(batch, q, k, meaning, mesh), meaning) if parts is None else _ChunkedWork(parts, meaning)
        )
        out: Tensor = _Attention.apply(self, work, q, k, v)
        return out

    def run(
        self, work: _Work | _ChunkedWork, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[_Work | _ChunkedWork, Tensor, list[Tensor]]:
        """Output (B, H, S_r, D_v) of the call whose turn it is, and what else its kernels returned."""
        if self._next is None:
            out, kept = work.first(q, k, v)
            if not work.has_kernels:
                self.note("attention without a kernel that torch's dispatcher sees, such as its formula")
            stored, others = self._keeper.keep(out.detach()), [self._keeper.keep(tensor) for tensor in kept]
            self._entries.append(_Entry(work, stored, others, version(out)))
            return work, out, kept
        if self._next >= len(self._entries):
            raise UlyssesError(
                "a checkpointed block with more attention calls in the backward than in the forward",
                "the same calls both times",
                "set checkpoint='block' in memory",
            )
        entry = self._entries[self._next]
        self._next += 1
        out = self._keeper.unpack(entry.out)
        if isinstance(entry.out, Tensor) and version(out) != entry.version:
            raise UlyssesError(
                f"the output {tuple(out.shape)} of an attention call, to which a checkpointed block writes in place",
                "an output that stays as it is, since it is kept for the backward",
                "write x = x * y in place of x *= y, or set checkpoint='block' in memory",
            )
        if entry.work.draws is not None:
            entry.work.draws[1].set()
        return entry.work, out, [self._keeper.unpack(each) for each in entry.kept]


def _reason(meaning: Meaning, q: Tensor) -> str | None:
    """Why a call with queries (B, H, S_r, D) must be computed twice, or None."""
    if not isinstance(meaning, Softmax):
        return f"attention by {type(meaning).__name__.lower()} functions"
    extras = meaning.extras
    tensors = [meaning.bias, *((extras.sinks, extras.alibi_slopes) if extras else ())]
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "attention with a learned bias or learned sinks"
    # Their kernel is compiled, which torch's dispatcher does not see.
    if extras and meaning.flash is None and is_gpu(q):
        return "attention with a softcap, sinks or ALiBi"
    return None


class _Attention(torch.autograd.Function):
    """An attention call that keeps its local inputs and output, and what kernels returned besides."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, work: _Work | _ChunkedWork, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # What is saved belongs to the checkpoint around it: it is there in the backward alone.
        ctx.work, out, kept = ledger.run(work, q, k, v)
        ctx.save_for_backward(q, k, v, out.detach(), *kept)
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, out, *kept = ctx.saved_tensors
        return None, None, *ctx.work.gradients((q, k, v), out, kept, gradient, ctx.needs_input_grad[2:])


class KeptAttention:
    """A note on a run: where attention calls find the ledger of the block that runs."""

    def __init__(self) -> None:
        self.ledger: Ledger | None = None
        self._said: set[str] = set()

    @contextmanager
    def within(self, ledger: Ledger | None) -> Iterator[None]:
        """Attention calls inside are those of a block."""
        before, self.ledger = self.ledger, ledger
        try:
            yield
        finally:
            self.ledger = before

    def say(self, reason: str) -> None:
        """Says once that some attention is computed twice."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"checkpoint='block+attention': {reason} is computed again in the backward", stacklevel=2)
