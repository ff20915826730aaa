"""Attention calls of a checkpointed block whose outputs are kept, so that they are computed once.

A block that is computed again gets the kept output, without attention and without its exchanges. The backward of the
call exchanges queries, keys, values and the output again, and builds the graph of the computation on them. Kernels do
not run for that: what they returned is kept, but for the output itself, which is part of the call's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.call import Meaning
from lightning_ulysses.attention.chunked_call import ChunkedCall
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
class _Part:
    """A tensor with the memory of the call's output: where in it, and how far from its beginning."""

    shape: torch.Size
    stride: tuple[int, ...]
    shift: int

    def of(self, out: Tensor) -> Tensor:
        return out.as_strided(self.shape, self.stride, out.storage_offset() + self.shift)


@dataclass(frozen=True)
class _Number:
    """The place of a tensor among those that are kept."""

    index: int


def _is_kernel(func: Any) -> bool:
    name = str(func)
    return ("attention" in name or "attn" in name) and "backward" not in name


class _Recording(TorchDispatchMode):
    """Takes note of what kernels return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if _is_kernel(func):
            self.calls.append((str(func), answer))
        return answer


class _Replaying(TorchDispatchMode):
    """Answers kernels by what they returned before."""

    def __init__(self, calls: Sequence[tuple[str, Any]], fill: Callable[[Any], Any]) -> None:
        super().__init__()
        self._calls = list(calls)
        self._fill = fill

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._calls and self._calls[0][0] == str(func):
            # Other objects each time, to which autograd may attach a graph.
            return tree_map(self._fill, self._calls.pop(0)[1])
        return func(*args, **(kwargs or {}))


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


def _same(tensor: Tensor) -> Tensor:
    # Another object: an output that its own graph holds is never freed.
    return tensor.detach()


@dataclass
class _Work:
    """How to compute one attention call, and to build its graph later; without the tensors that are kept.

    Attributes:
        exchange: Of the call.
        meaning: The computation.
        mesh: Sizes and groups.
        layout: Strides of the output (B, H_r, S, D_v) of the kernel.
        calls: The kernels by name, and what they returned with `_Part` and `_Number` in place of tensors.
        draws: The states of random numbers before and after the call, of the host and its device, if it has dropout.
        cast: Mixed precision of the call: type of the device, whether it is on, and its type.
    """

    exchange: Exchange
    meaning: Softmax
    mesh: SequenceMesh
    layout: tuple[int, ...] = ()
    calls: list[tuple[str, Any]] = field(default_factory=list)
    draws: tuple[_Draws, _Draws] | None = None
    cast: tuple[str, bool, torch.dtype] = ("cpu", False, torch.bfloat16)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.meaning.attend(q, k, v, self.exchange.query_heads, self.exchange.kv_index, self.mesh)

    def first(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output (B, H, S_r, D_v), and what kernels returned besides."""
        kind, has_draws = q.device.type, self.meaning.dropout_p > 0
        before = _Draws.now(q.device) if has_draws else None
        self.cast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        q, k, v = self.exchange.inputs(q, k, v)
        recording = _Recording()
        # Kernels return what their backward needs only where there will be one. Its graph is dropped here.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same), recording:
            out = self._attend(*(tensor.detach().requires_grad_() for tensor in (q, k, v))).detach()
        self.draws = None if before is None else (before, _Draws.now(out.device))
        self.layout = out.stride()
        kept: list[Tensor] = []

        def replace(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.untyped_storage()._cdata == out.untyped_storage()._cdata and leaf.numel() == out.numel():
                return _Part(leaf.shape, leaf.stride(), int(leaf.storage_offset() - out.storage_offset()))
            kept.append(leaf.detach())
            return _Number(len(kept) - 1)

        self.calls = [(name, tree_map(replace, answer)) for name, answer in recording.calls]
        return self.exchange.output(out), kept

    def gradients(
        self, inputs: Sequence[Tensor], out: Tensor, kept: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of queries, keys and values (B, heads, S_r, D)."""
        leaves = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(inputs, needed, strict=True)]
        # (B, H, S_r, D_v) -> (B, H_r, S, D_v); always, since all ranks exchange together
        whole = self._as_before(self.exchange.adjoint(out))

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, _Part):
                return leaf.of(whole)
            return kept[leaf.index].detach() if isinstance(leaf, _Number) else leaf

        kind, enabled, dtype = self.cast
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False), self._drawing():
            exchanged = self.exchange.inputs(*leaves)
            with _Replaying(self.calls, fill):
                found = self._attend(*exchanged)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        given = iter(torch.autograd.grad(found, wanted, self.exchange.adjoint(gradient), allow_unused=True))
        return [next(given) if needs else None for needs in needed]

    def _as_before(self, out: Tensor) -> Tensor:
        has_parts = any(isinstance(leaf, _Part) for leaf in tree_leaves(self.calls))
        if out.stride() == self.layout or not has_parts:
            return out
        return torch.empty_strided(out.shape, self.layout, dtype=out.dtype, device=out.device).copy_(out)

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
        calls: Of its kernels; empty if these run again.
        draws: See `_Work`.
    """

    parts: ChunkedCall
    meaning: Softmax
    calls: list[Any] = field(default_factory=list)
    draws: tuple[_Draws, _Draws] | None = None

    def first(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output (B, H, S_r, D_v), and what kernels returned besides."""
        before = _Draws.now(q.device) if self.meaning.dropout_p else None
        out, kept = self.parts.first((q, k, v), keeps=True)
        self.draws = None if before is None else (before, _Draws.now(q.device))
        self.calls = [call for trace in self.parts.traces for call in trace.calls or ()]
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
        reason = _reason(meaning)
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
        work = _Work(Exchange.of(batch, q, k, mesh), meaning, mesh) if parts is None else _ChunkedWork(parts, meaning)
        out: Tensor = _Attention.apply(self, work, q, k, v)
        return out

    def run(
        self, work: _Work | _ChunkedWork, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[_Work | _ChunkedWork, Tensor, list[Tensor]]:
        """Output (B, H, S_r, D_v) of the call whose turn it is, and what else its kernels returned."""
        if self._next is None:
            out, kept = work.first(q, k, v)
            if not work.calls:
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


def _reason(meaning: Meaning) -> str | None:
    """Why a call must be computed twice, or None."""
    if not isinstance(meaning, Softmax):
        return f"attention by {type(meaning).__name__.lower()} functions"
    extras = meaning.extras
    tensors = [meaning.bias, *((extras.sinks, extras.alibi_slopes) if extras else ())]
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "attention with a learned bias or learned sinks"
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
