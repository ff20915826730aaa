"""What is split at this moment: the one object that interceptors, hooks and public functions ask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import ALONE, SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.split_plan import SequencePlan
from lightning_ulysses.notes import Notes
from lightning_ulysses.patching.outside_graphs import F, eager


@dataclass
class LocalBatch:
    """One batch cut for this rank.

    Attributes:
        layout: The geometry of the cut.
        shards: This rank's slice of each sequence tensor, by key, on the device of the model.
        counts: Valid targets in this rank's slice, for each tensor that may hold the targets.
        seen: The same as the module sees it, where an empty slice shows one stand-in target. Where every rank gets the
            whole batch, its targets count as spread evenly over the ranks, and each rank sees all of them.
        rows: B.
        whole: Keys in ``shards`` that are whole instead, since a plan splits the model and not the batch.
        others: The geometry of other sequences that are split at the same place, such as what an encoder returned.
        partners: That of each input of another sequence, which may be equal to `layout`.
        cross_first: Whether another sequence stands before this one where attention joins both.
        keys: That of the keys of one attention call, if they are of another sequence; see `across`.
        notes: What features remember about this batch.
    """

    layout: SequenceLayout
    shards: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    seen: Mapping[str, float] = field(default_factory=dict)
    rows: int = 1
    whole: frozenset[str] = frozenset()
    others: tuple[SequenceLayout, ...] = ()
    partners: tuple[SequenceLayout, ...] = ()
    cross_first: bool = True
    keys: SequenceLayout | None = None
    notes: Notes = field(default_factory=Notes)

    @property
    def key_layout(self) -> SequenceLayout:
        """The geometry of the keys of an attention call."""
        return self.layout if self.keys is None else self.keys

    def across(self, queries: int, keys: int, rank: int) -> LocalBatch:
        """The batch as an attention call sees it, by the numbers of queries and keys on this rank."""
        share = self.layout.shares[rank]
        if queries == keys != share:
            # Both sequences in one, such as an image and a text that attend to each other.
            return next((replace(self, layout=each) for each in self._both if each.shares[rank] == queries), self)
        if queries == keys or keys == share:
            return self
        found = next((other for other in self.others if other.shares[rank] == keys), None)
        return self if found is None else replace(self, keys=found)

    def layout_of(self, length: int) -> SequenceLayout:
        """The geometry of the sequence of so many tokens."""
        known = (self.layout, *self.others, *self._both)
        return next((each for each in known if each.seq_len == length), self.layout)

    @property
    def _both(self) -> list[SequenceLayout]:
        pairs = ((other, self.layout) if self.cross_first else (self.layout, other) for other in self.partners)
        return [SequenceLayout.of_both(*pair) for pair in pairs]

    def is_slice(self, length: int, rank: int) -> bool:
        """Whether so many tokens are this rank's slice of a sequence that is split here, and not all of one."""
        is_whole = any(each.seq_len == length for each in (self.layout, *self.others))
        return not is_whole and any(each.shares[rank] == length for each in self.partners)

    def admit(self, length: int) -> SequenceLayout:
        """The geometry of a sequence of so many tokens, which is split at this place from now on."""
        layout = self.layout_of(length)
        if layout.seq_len != length:
            beside = tuple(each.shares for each in (self.layout, *self.others))
            layout = SequenceLayout(length, self.layout.sp_size, beside=beside)
            self.others = (*self.others, layout)
        if layout not in self.partners:
            self.partners = (*self.partners, layout)
        return layout

    @property
    def document_positions(self) -> Tensor | None:
        """The batch's own ``position_ids`` (B, S_r) where they mark documents."""
        own = self.shards.get("position_ids")
        return own if own is not None and own.dim() == 2 and self.layout.documents is not None else None

    def own(self, key: str, rank: int) -> Tensor | None:
        """This rank's slice (B, S_r) of a tensor (B, S) of the batch, also where the module gets all of it."""
        tensor = self.shards.get(key)
        if tensor is None or key not in self.whole or tensor.shape[1:2] != (self.layout.seq_len,):
            return tensor
        return tensor[:, self.layout.spans[rank]]


class Trial(Protocol):
    """What answers attention calls in place of the exchange."""

    def answer(self, call: Any, plain: Callable[[], Any]) -> Any:
        """Answers a call.

        Args:
            call: An `attention.call.AttentionCall`.
            plain: The caller's own function on the caller's own arguments.

        Returns:
            What the caller expects of its function.
        """


class Watch(Protocol):
    """What sees attention calls of a step that is split."""

    def note(self, call: Any, answer: Any) -> Any:
        """Takes note of a call.

        Args:
            call: An `attention.call.AttentionCall`.
            answer: What the caller would get.

        Returns:
            What it gets.
        """


@dataclass(frozen=True)
class Place:
    """Where in a step a call is made.

    Attributes:
        batch: Of the step that runs; None outside of steps, and where the step is hidden (`unsharded`).
        region: What attention computes on: the batch, or the part of a planned model that is split. None outside of it.
        is_known: False in the backward of a planned step, where a repeated forward may belong anywhere.
        trial: Answers attention calls while the model or the step is tried on a few tokens; see `checks`.
        is_uncompiled: Whether compiled code runs as it was written.
        last: The geometry of the region that ended here.
        watch: Sees attention calls while a way to split the model is tried.
        hidden: The region in which attention is plain here, since its keys are whole.
        is_joined: Whether a submodule runs here on the whole sequence that is split around it.
        is_backward: Whether the backward of the step's own loss runs here.
    """

    batch: LocalBatch | None = None
    region: LocalBatch | None = None
    is_known: bool = True
    trial: Trial | None = None
    is_uncompiled: bool = False
    last: SequenceLayout | None = None
    watch: Watch | None = None
    hidden: LocalBatch | None = None
    is_joined: bool = False
    is_backward: bool = False

    @property
    def takes_calls(self) -> bool:
        """Whether attention calls are taken over although nothing may be split."""
        return self.trial is not None or self.watch is not None


class SequenceContext:
    """Where the running step stands. Interceptors and hooks close over it and ask two questions.

    `split` is the batch that is cut at this place of the step; only then does attention exchange anything. `described`
    is the batch about which attention must know more than the model tells it: it is cut, or documents share its rows.

    Attributes:
        mesh: Sizes and groups.
        chosen: The plan of the running kind of step, see `use`; None where P = 1.
        is_proven: Whether a trial has shown that this kind of step is that of one process.
        place: Where the step is.
        suspensions: How often the step was hidden so far.
        notes: What features remember over all batches.
    """

    def __init__(self, mesh: SequenceMesh, plan: SequencePlan | None = None) -> None:
        self.mesh = mesh
        self.chosen = plan if mesh.sp_size > 1 else None
        self.is_proven = False
        self.place = Place()
        self.suspensions = 0
        self.notes = Notes()

    @property
    def plan(self) -> SequencePlan | None:
        """Where the model is split, in place of the batch; None where the batch is cut."""
        return self.chosen if self.chosen is not None and self.chosen.split else None

    def use(self, plan: SequencePlan | None, *, is_proven: bool = False) -> None:
        """Has the following steps split as ``plan`` says, whose hooks are in place; None cuts the batch."""
        self.chosen = plan if self.mesh.sp_size > 1 else None
        self.is_proven = is_proven

    @contextmanager
    def cutting(self, plan: SequencePlan | None = None) -> Iterator[None]:
        """As if the batch were cut, whatever the plan, and submodules ran as the joints of ``plan`` say."""
        before, self.chosen = self.chosen, plan
        try:
            yield
        finally:
            self.chosen = before

    @property
    def is_joined(self) -> bool:
        """Whether a plan joins the sequence again inside the model."""
        return self.plan is not None and bool(self.plan.join)

    @property
    def region(self) -> LocalBatch | None:
        """The batch that attention computes on at this place, cut or not.

        Raises:
            UlyssesError: In a backward that repeats a part of a planned forward in an unknown way.
        """
        place = self.place
        if not place.is_known:
            raise UlyssesError(
                "a forward repeated in the backward pass by other means than the checkpoint of torch or DeepSpeed",
                "to know which part of the planned model it belongs to",
                "checkpoint with torch.utils.checkpoint.checkpoint, called by its full name",
            )
        return place.region

    @property
    def split(self) -> LocalBatch | None:
        """The batch that is cut here, or None."""
        return self.region if self.mesh.sp_size > 1 else None

    @property
    def described(self) -> LocalBatch | None:
        """The batch where attention must know more than the model tells it, or None."""
        region = self.region
        if region is None or self.mesh.sp_size > 1 or region.layout.documents is not None:
            return region
        return None

    @property
    def share(self) -> int:
        """S_r, the tokens of this rank in what is split here."""
        assert self.split is not None
        return self.split.layout.shares[self.mesh.sp_rank]

    @property
    def awaits_region(self) -> LocalBatch | None:
        """The whole batch outside of the regions of a planned step that joins the sequence again, or None.

        Also in a submodule that runs on the whole sequence.
        """
        is_whole = self.is_joined or self.place.is_joined
        return self.place.batch if is_whole and self.place.region is None else None

    def takes_over(
        self, original: Callable[..., Any], *, outside_regions: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorates the function that stands for ``original`` where a batch is described, outside of compiled graphs.

        Every other call runs ``original`` as if nothing had been patched.

        Args:
            original: The function.
            outside_regions: Whether calls are taken over where `awaits_region` as well.
        """

        def decorate(replacement: Callable[..., Any]) -> Callable[..., Any]:
            outside = eager(replacement)

            @functools.wraps(original)
            def choose(*args: Any, **kwargs: Any) -> Any:
                live = self.place.takes_calls or self.described is not None
                if live or (outside_regions and self.awaits_region is not None):
                    return outside(*args, **kwargs)
                return original(*args, **kwargs)

            return choose

        return decorate

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """Goes to another place of the step, and comes back."""
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before

    def step(self, batch: LocalBatch) -> AbstractContextManager[None]:
        """A step on ``batch``. A plan decides inside where it is split; without one, all of it is."""
        return self.at(Place(batch, None if self.plan else batch))

    def backward(self, batch: LocalBatch) -> AbstractContextManager[None]:
        """The backward of a step: activation checkpointing repeats parts of the forward in it."""
        return self.at(Place(batch, None if self.plan else batch, is_known=self.plan is None, is_backward=True))

    def rehearsed_backward(self) -> AbstractContextManager[None]:
        """The backward of a step that is tried: as `backward`, in so far as the trial splits the model itself."""
        place = self.place
        return self.at(replace(place, is_known=self.plan is None or place.trial is not None, is_backward=True))

    def enter(self, region: LocalBatch) -> None:
        """Begins a region of a planned model; it ends with `leave`, or with the step."""
        self.place = replace(self.place, region=region, last=None)

    def leave(self, layout: SequenceLayout) -> None:
        """Ends a region of a planned model."""
        self.place = replace(self.place, region=None, last=layout)

    def tried(self, trial: Trial, batch: LocalBatch) -> AbstractContextManager[None]:
        """Puts another batch in the place of the running one, and has ``trial`` answer attention calls."""
        return self.at(replace(self.place, batch=batch, region=batch, is_known=True, trial=trial, last=None))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """As if this process were the only one."""
        mesh, self.mesh = self.mesh, ALONE
        try:
            yield
        finally:
            self.mesh = mesh

    @contextmanager
    def rehearsed(self, plan: SequencePlan, batch: LocalBatch, watch: Watch) -> Iterator[None]:
        """A step on ``batch`` that is split as ``plan`` says, while ``watch`` sees its attention calls."""
        before, self.chosen = self.chosen, plan
        try:
            with self.at(Place(batch, watch=watch, is_uncompiled=True)):
                yield
        finally:
            self.chosen = before

    def plain(self) -> AbstractContextManager[None]:
        """Leaves attention alone, also while the model is tried."""
        return self.at(Place(is_uncompiled=self.place.is_uncompiled))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Hides the step, so that attention is plain."""
        self.suspensions += 1
        with self.at(replace(self.place, batch=None, region=None, is_known=True, last=None)):
            yield

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Runs compiled code as it was written."""
        with torch.compiler.set_stance("force_eager"), self.at(replace(self.place, is_uncompiled=True)):
            yield


class _Slot:
    """Where public functions find the context, since nobody hands it to them.

    A context variable would not do: activation checkpointing repeats the forward on autograd's own threads.
    """

    context: SequenceContext | None = None


def activate(context: SequenceContext | None) -> None:
    """Makes ``context`` the one that public functions see; ``None`` when a strategy is torn down."""
    _Slot.context = context


def current_context() -> SequenceContext | None:
    """The context of the strategy that is set up in this process."""
    return _Slot.context


def eager_while_live(function: F) -> F:
    """Keeps a public function out of compiled graphs as long as its result depends on the running step."""
    outside = eager(function)

    @functools.wraps(function)
    def choose(*args: Any, **kwargs: Any) -> Any:
        context = _Slot.context
        # Also before and after the region of a plan, where the batch may be cut and the model is not.
        if context is not None and (
            context.place.takes_calls or (context.place.batch is not None and context.mesh.sp_size > 1)
        ):
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return choose  # type: ignore[return-value]
