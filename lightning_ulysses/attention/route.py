"""Where every attention call of a step is decided upon: plain, to a memory, tried, or exchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_ulysses.attention.call import AttentionCall
from lightning_ulysses.attention.mask_table import MaskTable
from lightning_ulysses.attention.stand_in import keep_apart
from lightning_ulysses.attention.ulysses import exchanged
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.errors import UlyssesError


@dataclass
class AttentionTally:
    """A note about a run.

    Attributes:
        calls: Attention calls that were exchanged, or attended to a memory.
        attends_memory: Whether the model, when it was tried, attended to keys that are no part of the sequence.
    """

    calls: int = 0
    attends_memory: bool = False


def route(context: SequenceContext, batch: LocalBatch | None, call: AttentionCall, plain: Callable[[], Any]) -> Any:
    """Runs one attention call in the way that fits the place of the step.

    Args:
        context: Where the step stands.
        batch: `SequenceContext.described`.
        call: The call.
        plain: The caller's own function on the caller's own arguments.

    Returns:
        What the caller expects of its function.

    Raises:
        UlyssesError: If the call cannot be exchanged exactly.
    """
    if context.place.is_tried:
        tally = context.notes.of(AttentionTally)
        tally.attends_memory |= call.k.shape[-2] != call.q.shape[-2]
        return call.write(keep_apart(call.q, call.k, call.v))
    if batch is None:
        return plain()
    known = None if call.mask is None else batch.notes.of(MaskTable).get(call.mask)
    if context.mesh.sp_size == 1 and known is None:
        return plain()
    tally = context.notes.of(AttentionTally)
    tally.calls += 1
    if tally.attends_memory and _sees_memory(context, batch, call):
        return plain() if call.memory is None else call.write(call.memory())
    return call.write(exchanged(batch, call.q, call.k, call.v, call.meaning(batch, known), context.mesh))


def intercept(
    context: SequenceContext, original: Callable[..., Any], read: Callable[..., AttentionCall]
) -> Callable[..., Any]:
    """What stands for an attention function while a strategy is set up.

    Args:
        context: Where the step stands.
        original: The function.
        read: Takes the function's arguments and reads them as an `AttentionCall`.
    """

    @context.takes_over(original)
    def attention(*args: Any, **kwargs: Any) -> Any:
        # Whoever is taken over has asked whether the batch is described.
        return route(context, context.place.region, read(*args, **kwargs), partial(original, *args, **kwargs))

    return attention


def _sees_memory(context: SequenceContext, batch: LocalBatch, call: AttentionCall) -> bool:
    """Whether keys (..., S_k, D) are a memory's, whole on every rank, so that nothing has to be exchanged.

    That they are, and no pooled slice, has been tried on the model; see `checks.probing`.

    Raises:
        UlyssesError: For causal attention to a memory, which has no positions in the sequence.
    """
    queries, keys, shares = call.q.shape[-2], call.k.shape[-2], batch.layout.shares
    if not call.takes_memory or keys in shares or queries != shares[context.mesh.sp_rank]:
        return False
    if call.is_causal:
        raise UlyssesError(
            f"causal attention of {queries} tokens to {keys} keys",
            "attention to a memory without is_causal, or to the sequence itself",
            "leave is_causal out where keys are not those of the sequence",
        )
    return True
