"""The micro-batches of one optimizer step, counted before its first backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class AccumulationWindow:
    """What is known about an optimizer step before its first backward.

    Args:
        size: Micro-batches in it; fewer than ``accumulate_grad_batches`` at the end of an epoch.
        totals: For each tensor that may hold the targets, those of this data-parallel rank's micro-batches.
        counts: The same per micro-batch, to notice a batch that changes after it was counted.
    """

    size: int
    totals: Mapping[str, float]
    counts: tuple[Mapping[str, float], ...] = ()
