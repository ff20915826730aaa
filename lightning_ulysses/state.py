"""What is being trained on right now: the mesh and the live batch, for everything that has to ask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.graphs import F, eager
from lightning_ulysses.layout import Runs, SequenceLayout
from lightning_ulysses.mesh import SequenceMesh


@dataclass
class TargetEvidence:
    """What a cross entropy of the step was computed on; ``name`` is set where the tensor is known for certain."""

    target: Tensor | None = None
    ignore_index: int = -100
    is_mean: bool = True
    name: str | None = None


@dataclass
class LiveBatch:
    """One batch cut for this rank.

    Attributes:
        layout: The geometry of the cut.
        shards: This rank's slice of each sequence tensor, by key, on the device of the model.
        evidence: The losses computed on it so far, while it is open which tensor holds the targets.
        masks: Attention masks handed to the model, by storage address; see `attention.masks`.
        runs: Documents that ``cu_seqlens`` tensors mark, by address and version: only the first layer reads them.
        keep: Tensors kept alive so that those addresses stay theirs.
        counts: Valid targets in this rank's slice, for each tensor that may hold the targets.
        rows: B.
        seen: The same as the module sees it, where an empty slice shows one stand-in target.
    """

    layout: SequenceLayout
    shards: dict[str, Tensor] = field(default_factory=dict)
    evidence: list[TargetEvidence] = field(default_factory=list)
    masks: dict[int, object] = field(default_factory=dict)
    runs: dict[tuple[int, ...], Runs] = field(default_factory=dict)
    keep: list[Tensor] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    rows: int = 1


class SequenceState:
    """Owned by the strategy; interceptors close over it.

    A batch is *pending* once it has been cut and *live* while a step (and its backward) runs on it. Only a live batch
    makes attention exchange anything.
    """

    def __init__(self, mesh: SequenceMesh) -> None:
        self.mesh = mesh
        self.pending: LiveBatch | None = None
        self.attention_calls = 0
        self.suspensions = 0
        self.collect_evidence = False
        self.probing = False
        # Whether a model that was probed attends to keys that are no part of the sequence.
        self.attends_memory = False
        self._depth = 0

    @property
    def batch(self) -> LiveBatch | None:
        """The live batch, or None."""
        return self.pending if self._depth > 0 else None

    @property
    def sharded_batch(self) -> LiveBatch | None:
        """The live batch where it is really cut, i.e. P > 1."""
        return self.batch if self.mesh.sp_size > 1 else None

    @property
    def described_batch(self) -> LiveBatch | None:
        """The live batch where attention must know more than a model tells it: it is cut, or documents share a row."""
        batch = self.batch
        if batch is None or self.mesh.sp_size > 1 or batch.layout.documents is not None:
            return batch
        return None

    def takes_over(self, original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorates what stands for ``original`` while a batch is live, kept out of compiled graphs.

        In every other call, ``original`` runs as if nothing had been put in its place.
        """

        def decorate(replacement: Callable[..., Any]) -> Callable[..., Any]:
            outside = eager(replacement)

            @functools.wraps(original)
            def choose(*args: Any, **kwargs: Any) -> Any:
                if self.probing or self.described_batch is not None:
                    return outside(*args, **kwargs)
                return original(*args, **kwargs)

            return choose

        return decorate

    @contextmanager
    def live(self) -> Iterator[None]:
        """Marks the pending batch as live; nests."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @contextmanager
    def probed(self) -> Iterator[None]:
        """Hides the live batch, and has every intercepted attention call keep tokens apart."""
        depth, self._depth, self.probing = self._depth, 0, True
        try:
            yield
        finally:
            self._depth, self.probing = depth, False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Hides the live batch, so that attention is plain."""
        self.suspensions += 1
        depth, self._depth = self._depth, 0
        try:
            yield
        finally:
            self._depth = depth


class _Slot:
    """Where public functions that take no strategy find it.

    A context variable would not do: activation checkpointing recomputes the forward on autograd's own threads.
    """

    state: SequenceState | None = None


def activate(state: SequenceState | None) -> None:
    """Makes ``state`` the one that public functions see; ``None`` when a strategy is torn down."""
    _Slot.state = state


def current_state() -> SequenceState | None:
    """The state of the strategy that is set up in this process."""
    return _Slot.state


def sharded_state() -> SequenceState | None:
    """The current state if a batch is live and cut, else None."""
    state = _Slot.state
    return state if state is not None and state.sharded_batch is not None else None


def eager_while_live(function: F) -> F:
    """Keeps a public function out of compiled graphs as long as it depends on the live batch."""
    outside = eager(function)

    @functools.wraps(function)
    def choose(*args: Any, **kwargs: Any) -> Any:
        state = _Slot.state
        if state is not None and (state.probing or state.sharded_batch is not None):
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return choose  # type: ignore[return-value]


@contextmanager
def unsharded() -> Iterator[None]:
    """Plain attention inside a step: for a forward on tensors that are whole on every rank.

    Example:
        >>> with lightning_ulysses.unsharded():
        ...     sample = self.model(prompt)
    """
    state = _Slot.state
    if state is None:
        yield
        return
    with state.suspended():
        yield


def check_share(length: int, layout: SequenceLayout, rank: int, what: str) -> None:
    """Raises `UlyssesError` unless ``length`` is this rank's share of the live batch."""
    share = layout.shares[rank]
    if length != share:
        raise UlyssesError(
            f"{what} over {length} tokens while this rank holds {share} of the batch's {layout.seq_len}",
            f"a length of {share}",
            "run a forward on other data inside `with lightning_ulysses.unsharded():`",
        )


@eager_while_live
def sequence_positions(x: Tensor, dim: int = 1) -> Tensor:
    """Positions of this rank's tokens in the whole sequence, in place of ``torch.arange(x.shape[dim])``.

    Args:
        x: Any tensor that carries the sequence, (B, S_r) or (B, S_r, ...).
        dim: The dimension of ``x`` that carries the sequence.

    Returns:
        (S_r,) int64 on the device of ``x``; 0 ... S-1 when nothing is sharded.

    Raises:
        UlyssesError: If a batch is live and ``x`` does not have this rank's share of it along ``dim``.
    """
    length, offset = x.shape[dim], 0
    state = sharded_state()
    if state is not None and state.sharded_batch is not None:
        layout, rank = state.sharded_batch.layout, state.mesh.sp_rank
        check_share(length, layout, rank, f"sequence_positions(x, dim={dim})")
        offset = layout.start(rank)
    return torch.arange(offset, offset + length, device=x.device)


def join_sequence(x: Tensor, shares: tuple[int, ...], dim: int, group: dist.ProcessGroup) -> Tensor:
    """All-gathers slices of S_r tokens along ``dim`` into the whole sequence; not differentiable."""
    # (..., S_r, ...) -> (S_r, ...), then padded to the largest share
    local = x.detach().movedim(dim, 0)
    padded = local.new_zeros(max(shares), *local.shape[1:])
    padded[: local.shape[0]] = local
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded, group=group)
    # Each (S_i, ...) -> (S, ...) -> (..., S, ...)
    return torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)]).movedim(0, dim).contiguous()


@eager_while_live
def gather_sequence(x: Tensor, dim: int = 1) -> Tensor:
    """The whole sequence from this rank's slice: (B, S_r, ...) -> (B, S, ...), the same on every rank of the group.

    Every rank of the sequence-parallel group has to call it. Gradients do not flow through it. ``x`` comes back as it
    is when nothing is sharded.

    Raises:
        UlyssesError: If ``x`` does not have this rank's share of the live batch along ``dim``.
    """
    state = sharded_state()
    if state is None or state.sharded_batch is None or state.mesh.sp_group is None:
        return x
    layout = state.sharded_batch.layout
    check_share(x.shape[dim], layout, state.mesh.sp_rank, f"gather_sequence(x, dim={dim})")
    whole = join_sequence(x, layout.shares, dim, state.mesh.sp_group)
    return whole.narrow(dim, 0, layout.seq_len - layout.num_padding)
