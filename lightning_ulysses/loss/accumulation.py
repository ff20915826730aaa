"""The micro-batches of one optimizer step: what is known of them beforehand, and their loss so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


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


@dataclass
class LossWindow:
    """One optimizer step under way.

    Attributes:
        size: Micro-batches in it.
        totals: N for each tensor that may hold the targets, over all micro-batches and data-parallel ranks.
        index: The current micro-batch.
        loss: This rank's part of the exact loss so far.
    """

    size: int
    totals: Mapping[str, float]
    index: int = 0
    loss: Tensor | None = None

    @property
    def is_last(self) -> bool:
        """Whether the optimizer steps after the current micro-batch."""
        return self.index + 1 >= self.size

    def add(self, part: Tensor) -> None:
        """Adds one micro-batch's part of the loss."""
        self.loss = part if self.loss is None else self.loss + part
