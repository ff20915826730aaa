"""The dispatch of every attention call: plain, a stand-in during a trial, to a memory, or exchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from lightning_ulysses.attention.attend import Softmax
from lightning_ulysses.attention.call import AttentionCall, Meaning, TokenCall
from lightning_ulysses.attention.chunked import HeadChunks, chunked_call, exchanged_by_chunks
from lightning_ulysses.attention.kept import KeptAttention
from lightning_ulysses.attention.mask_table import MaskTable
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.exchange.turns import BackwardTurns
from lightning_ulysses.geometry.mask_spec import MaskSpec


@dataclass
class AttentionTally:
    """A note on a run.

    Attributes:
        calls: Number of calls that were exchanged or attended to a memory, of functions of `mixing` as well.
        attends_memory: Whether the model attended to a memory during its trial.
    """

    calls: int = 0
    attends_memory: bool = False


def route(context: SequenceContext, batch: LocalBatch | None, call: AttentionCall, plain: Callable[[], Any]) -> Any:
    """Runs one attention call in the way that the state of the step requires.

    Args:
        context: Tells what is split at this moment.
        batch: `SequenceContext.described`.
        call: The call.
        plain: Runs the caller's original function with the caller's arguments.

    Returns:
        The return value for the caller.

    Raises:
        UlyssesError: If the call cannot be exchanged exactly.
    """
    return seen(context, call, plain, lambda: _answer(context, batch, call, plain))


def seen(context: SequenceContext, call: TokenCall, plain: Callable[[], Any], answer: Callable[[], Any]) -> Any:
    """Answers a call, in a trial as that says, and lets a watch see it.

    Args:
        context: Where the step stands.
        call: The call.
        plain: Runs the caller's original function with the caller's arguments.
        answer: Answers the call in a step.
    """
    # First, since a trial may run without a batch.
    if context.place.trial is not None:
        return context.place.trial.answer(call, plain)
    place = context.place
    if place.watch is None:
        return answer()
    # What is called may itself call a function that is taken over.
    with context.at(replace(place, watch=None)):
        found = answer()
    return place.watch.note(call, found)


def _answer(context: SequenceContext, batch: LocalBatch | None, call: AttentionCall, plain: Callable[[], Any]) -> Any:
    known = None if call.mask is None else _known_mask(context, batch, call.mask)
    if batch is None:
        whole = context.place.batch
        # Outside of the regions of a plan, a mask that was described there has no values of its own.
        if known is None or whole is None:
            return plain()
        # What runs on the joined sequence gets no padding of this package.
        known = known.unpadded(whole.layout.real_len) if call.lengths[1] == whole.layout.real_len else known
        meaning = call.meaning(whole, known)
        meaning = meaning if call.lengths[0] == call.lengths[1] else _of_other(meaning)
        return call.write(meaning.attend(call.q, call.k, call.v, slice(0, call.q.shape[1]), None, ALONE, 0))
    # On one rank only known masks are replaced, which stand for documents of a packed row.
    if context.mesh.sp_size == 1 and known is None:
        return plain()
    tally = context.notes.of(AttentionTally)
    tally.calls += 1
    # Only if the trial has seen a memory; otherwise a wrong length is an error in `exchanged`.
    ledger = context.notes.of(KeptAttention).ledger
    if tally.attends_memory and _sees_memory(context, batch, call):
        if ledger is not None:
            ledger.note("attention to a memory")
        return plain() if call.memory is None else call.write(call.memory())
    batch = batch.across(call.q.shape[-2], call.k.shape[-2], context.mesh.sp_rank)
    if batch.keys is not None and call.is_causal:
        raise _causal_memory(call)
    meaning = call.meaning(batch, known)
    out = _exchanged(context, batch, call, meaning if batch.keys is None else _of_other(meaning))
    context.notes.of(BackwardTurns).before(out)
    return call.write(out)


def _exchanged(context: SequenceContext, batch: LocalBatch, call: AttentionCall, meaning: Meaning) -> Tensor:
    inputs, mesh = (call.q, call.k, call.v), context.mesh
    chunks, ledger = context.notes.of(HeadChunks), context.notes.of(KeptAttention).ledger
    # Chunks of heads travel along one sequence.
    is_cut = chunks.count != 1 and mesh.sp_group is not None and batch.keys is None
    # Inside of a checkpointed block.
    if ledger is not None and ledger.takes(inputs, meaning):
        parts = chunked_call(batch, call.q, call.k, meaning, mesh, chunks) if is_cut else None
        return ledger.answer(batch, *inputs, meaning, mesh, parts)
    if is_cut:
        return exchanged_by_chunks(batch, *inputs, meaning, mesh, chunks)
    return exchanged(batch, *inputs, meaning, mesh)


def _known_mask(context: SequenceContext, region: LocalBatch | None, mask: Tensor) -> MaskSpec | None:
    """The spec of a mask that was described in the region, or before it on the whole batch."""
    batches = [batch for batch in (region, context.place.batch) if batch is not None]
    return next((spec for batch in batches if (spec := batch.notes.of(MaskTable).get(mask)) is not None), None)


def intercept(
    context: SequenceContext, original: Callable[..., Any], read: Callable[..., AttentionCall]
) -> Callable[..., Any]:
    """The replacement of an attention function while a strategy is set up.

    Args:
        context: Tells what is split at this moment.
        original: The function.
        read: Takes the function's arguments and returns them as an `AttentionCall`.
    """

    @context.takes_over(original, outside_regions=True)
    def attention(*args: Any, **kwargs: Any) -> Any:
        return route(context, context.place.region, read(*args, **kwargs), partial(original, *args, **kwargs))

    return attention


def _sees_memory(context: SequenceContext, batch: LocalBatch, call: AttentionCall) -> bool:
    """Whether keys (..., S_k, D) belong to a memory, which is whole on every rank and needs no exchange.

    The trial has checked that they are not pooled from a slice; see `checks.trial`.

    Raises:
        UlyssesError: For causal attention to a memory, which has no positions in the sequence.
    """
    queries, keys, shares = call.q.shape[-2], call.k.shape[-2], batch.layout.shares
    if any(keys in other.shares for other in batch.others):
        return False
    # A length that equals some rank's share may be a slice. All ranks must decide alike, so all shares count.
    if not call.takes_memory or keys in shares or queries != shares[context.mesh.sp_rank]:
        return False
    if call.is_causal:
        raise _causal_memory(call)
    return True


def _of_other(meaning: Meaning) -> Meaning:
    """Attention to keys of another sequence."""
    if not isinstance(meaning, Softmax):
        raise UlyssesError(
            f"attention by {type(meaning).__name__.lower()} functions to keys of another sequence",
            "softmax attention, with masks over keys or of both whole sequences",
            "call torch.nn.functional.scaled_dot_product_attention there",
        )
    return replace(meaning, spec=replace(meaning.spec, documents=None, is_other=True))


def _causal_memory(call: AttentionCall) -> UlyssesError:
    return UlyssesError(
        f"causal attention of {call.q.shape[-2]} tokens to {call.k.shape[-2]} keys",
        "attention to a memory without is_causal, or to the sequence itself",
        "leave is_causal out where keys are not those of the sequence",
    )
