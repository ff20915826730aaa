"""Tells tensors apart whose targets weight a loss alike: tries the step with fewer targets in one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_ulysses.loss.targets import likeliest_first


@dataclass(frozen=True)
class Attempt:
    """What a step says with fewer targets in one tensor.

    Attributes:
        names: Tensors whose counts are then the weights; None if nothing can be said.
        fails: Whether the step takes no ignored entries there.
        breaks: Whether it runs on all rows, and not on some of them.
    """

    names: frozenset[str] | None = None
    fails: bool = False
    breaks: bool = False


def agreed(attempts: Sequence[Attempt]) -> Attempt:
    """The attempts of all ranks as one."""
    known = [attempt.names for attempt in attempts if attempt.names is not None]
    names = frozenset.intersection(*known) if known else None
    return Attempt(names, any(each.fails for each in attempts), any(each.breaks for each in attempts))


def narrow(names: frozenset[str], attempt: Callable[[str], Attempt]) -> frozenset[str]:
    """Those that still give the weights once any of them has fewer targets.

    Args:
        names: Tensors that give one batch the same weights.
        attempt: Tries the step with fewer targets in a tensor, with the same result on all ranks.
    """
    for name in likeliest_first(names):
        if len(names) < 2:
            break
        if name not in names or name == "tokens":
            continue
        found = attempt(name)
        if found.fails:
            # It has a target in every token, in any batch that the step takes.
            names -= {name}
        elif found.names and names & found.names:
            names &= found.names
    return names
