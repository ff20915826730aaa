"""What is being trained on right now: the mesh and the live batch, for everything that has to ask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import SequenceMesh
from lightning_ulysses.geometry.layout import Runs, SequenceLayout
from lightning_ulysses.patching.outside_graphs import F, eager


@dataclass
class TargetEvidence:
    """What a cross entropy of the step was computed on, and its result.

    Attributes:
        target: The targets.
        ignore_index: The one that counts as none.
        is_mean: Whether it is a mean over them; else ``value`` is their sum, or has one entry for each.
        name: Of the tensor with the targets, where that is known for certain.
        value: The result.
    """

    target: Tensor | None = None
    ignore_index: int = -100
    is_mean: bool = True
    name: str | None = None
    value: Tensor | None = None


@dataclass
class LiveBatch:
    """One batch cut for this rank.

    Attributes:
        layout: The geometry of the cut.
        shards: This rank's slice of each sequence tensor, by key, on the device of the model.
        evidence: The losses computed on it so far, while it is open which tensor holds the targets.
        masks: Attention masks handed to the model, by storage address; see `interceptors.transformers.masks`.
        runs: Documents that ``cu_seqlens`` tensors mark, by address and version: only the first layer reads them.
        keep: Tensors kept alive so that those addresses stay theirs.
        counts: Valid targets in this rank's slice, for each tensor that may hold the targets.
        rows: B.
        seen: The same as the module sees it, where an empty slice shows one stand-in target. Where every rank gets the
            whole batch, its targets count as spread evenly over the ranks, and each rank sees all of them.
        whole: Keys in ``shards`` that are whole instead, since a plan splits the model and not the batch.
        measured: The geometry of the last region that a plan split.
        has_whole_part: Whether a part of the loss is that of the whole batch on every rank, such as a router's.
        outside: Storages of tensors that a region's first submodule got beside those that were split, such as a text.
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
    whole: frozenset[str] = frozenset()
    measured: SequenceLayout | None = None
    has_whole_part: bool = False
    outside: set[int] = field(default_factory=set)

    @property
    def split_layout(self) -> SequenceLayout:
        """The geometry of what was split, where the batch itself says nothing of it."""
        is_unknown = self.layout.seq_len == self.layout.sp_size
        return self.measured if self.measured is not None and is_unknown else self.layout

    def own(self, key: str, rank: int) -> Tensor | None:
        """This rank's slice (B, S_r) of a tensor (B, S) of the batch, also where the module gets all of it."""
        tensor = self.shards.get(key)
        if tensor is None or key not in self.whole or tensor.shape[1:2] != (self.layout.seq_len,):
            return tensor
        return tensor[:, self.layout.span(rank)]


@dataclass(frozen=True)
class Place:
    """Where in a step a call is made.

    Attributes:
        region: What is split there; None outside of a region.
        is_hidden: Whether nothing counts as split there, as in `unsharded`.
        is_known: False in a backward pass, which does not say what a forward that it repeats was a part of.
        last: The geometry of the region that ended here.
    """

    region: LiveBatch | None = None
    is_hidden: bool = False
    is_known: bool = True
    last: SequenceLayout | None = None


class SequenceState:
    """Owned by the strategy; interceptors close over it.

    A batch is *pending* once it has been cut and *live* while a step (and its backward) runs on it. Only a live batch
    makes attention exchange anything. With a plan (`regions`), a batch is live in a *region* of the step only.

    Attributes:
        is_planned: Whether a plan says where a sequence is split.
        is_joined: Whether it also says where the sequence is joined again.
        place: Where the step is, as far as a plan tells.
        splits: Regions begun so far.
        runs_uncompiled: Whether what is compiled runs as it was written.
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
        self.is_planned = self.is_joined = False
        self.place = Place()
        self.splits = 0
        self.runs_uncompiled = False
        self._depth = 0

    @property
    def running(self) -> LiveBatch | None:
        """The batch of the step that runs, whether or not it is split at this moment; None where that is suspended."""
        return self.pending if self._depth > 0 and not self.place.is_hidden else None

    @property
    def batch(self) -> LiveBatch | None:
        """The live batch, or None.

        Raises:
            UlyssesError: In a backward pass that repeats a part of a planned forward in an unknown way.
        """
        if self.running is None or not self.is_planned:
            return self.running
        if not self.place.is_known:
            raise UlyssesError(
                "a forward repeated in the backward pass by other means than the checkpoint of torch or DeepSpeed",
                "to know which part of the planned model it belongs to",
                "checkpoint with torch.utils.checkpoint.checkpoint, called by its full name",
            )
        return self.place.region

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
    def live(self, *, backward: bool = False) -> Iterator[None]:
        """Marks the pending batch as live, for a step or its backward pass; nests."""
        self._depth += 1
        try:
            with self.placed(Place(is_known=not backward)):
                yield
        finally:
            self._depth -= 1

    @contextmanager
    def placed(self, place: Place) -> Iterator[None]:
        """Goes to another place in the step, and comes back."""
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Runs what is compiled as it was written."""
        before, self.runs_uncompiled = self.runs_uncompiled, True
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.runs_uncompiled = before

    @contextmanager
    def probed(self, batch: LiveBatch | None = None) -> Iterator[None]:
        """Puts another batch, or none, in the place of the live one, and has attention calls keep tokens apart."""
        before = self._depth, self.probing, self.pending
        self._depth, self.probing, self.pending = int(batch is not None), True, batch
        try:
            with self.placed(Place(batch)):
                yield
        finally:
            self._depth, self.probing, self.pending = before

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Leaves attention alone, also while it is probed."""
        probing, self.probing = self.probing, False
        try:
            with self.placed(Place(is_hidden=True)):
                yield
        finally:
            self.probing = probing

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Hides the live batch, so that attention is plain."""
        self.suspensions += 1
        with self.placed(Place(is_hidden=True)):
            yield


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
        # Also before and behind the region of a plan, where the batch may be cut and the model is not.
        if state is not None and (state.probing or (state.running is not None and state.mesh.sp_size > 1)):
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return choose  # type: ignore[return-value]
