"""The targets of an accumulation window, counted before its first backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


def _nothing(batch: Any) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True)
class AccumulationWindow:
    """The micro-batches of one optimizer step, on one data-parallel rank.

    Args:
        batches: The micro-batches. At the end of an epoch there may be fewer than ``accumulate_grad_batches``.
        count: Counts the targets of one of them, for each tensor that may hold them. Called when the window begins,
            and not when it is loaded: the first step decides how batches are read.
    """

    batches: Sequence[Any]
    count: Callable[[Any], Mapping[str, float]] = _nothing

    @property
    def size(self) -> int:
        """Number of micro-batches."""
        return len(self.batches)

    @cached_property
    def counts(self) -> tuple[Mapping[str, float], ...]:
        """The targets of each micro-batch. A window of one needs no look-ahead: they are counted when it is used."""
        return tuple(map(self.count, self.batches)) if self.size > 1 else ()

    @property
    def totals(self) -> dict[str, float]:
        """The number of targets in all micro-batches, for each tensor that may hold them."""
        # Only tensors of all micro-batches: a sum over some of them would be too small.
        names = set.intersection(*map(set, self.counts)) if self.counts else set()
        return {name: sum(count[name] for count in self.counts) for name in sorted(names)}
