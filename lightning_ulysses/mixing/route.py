"""The dispatch of a call: as it is, an answer of a trial, or exchanged."""

from __future__ import annotations

from typing import Any

from lightning_ulysses.attention.route import AttentionTally, seen
from lightning_ulysses.context import SequenceContext
from lightning_ulysses.exchange.turns import BackwardTurns
from lightning_ulysses.mixing.call import MixerCall
from lightning_ulysses.mixing.exchange import exchanged


def route(context: SequenceContext, call: MixerCall) -> Any:
    """Runs a call in the way that the state of the step requires.

    Args:
        context: Tells what is split at this moment.
        call: The call.

    Returns:
        The return value for the caller.

    Raises:
        UlyssesError: If the call cannot be exchanged exactly.
    """

    def plain() -> Any:
        return call.original(*call.args, **call.kwargs)

    def answer() -> Any:
        batch = context.split
        if batch is None:
            return plain()
        context.notes.of(AttentionTally).calls += 1
        out = exchanged(call, batch, context)
        context.notes.of(BackwardTurns).before(out)
        return call.write(out)

    return seen(context, call, plain, answer)
