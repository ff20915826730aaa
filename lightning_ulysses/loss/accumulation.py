"""The targets of an accumulation window, counted before its first backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class AccumulationWindow:
    """The micro-batches of one optimizer step, on one data-parallel rank.

    Args:
        size: Number of micro-batches. At the end of an epoch it may be less than ``accumulate_grad_batches``.
        totals: The number of targets in all micro-batches, for each tensor that may hold them.
        counts: The same for each micro-batch, to notice a batch that changes after it was counted.
    """

    size: int
    totals: Mapping[str, float]
    counts: tuple[Mapping[str, float], ...] = ()
