r"""How local means add up to the exact token mean of an optimizer step.

Rank w holds n_w targets of micro-batch m and the module returns their mean, L_wm = sum(l) / n_wm. What one process
would minimise over the whole step is

    L = (1 / N) * sum_{w, m} n_wm * L_wm,        N = sum_{w, m} n_wm.

DeepSpeed without ``mpu`` averages gradients over all W processes, at every ZeRO stage and with ``scale_wrt_gas=False``
sums them over micro-batches, so each rank back-propagates L_wm * n_wm * W / N. N spans every micro-batch of the step on
every data-parallel rank; a rank's own mean never enters it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowPlan:
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


@dataclass
class WeightedMean:
    """A mean over targets that are spread over batches and ranks, kept as a sum and a count in float64."""

    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    count: float = 0.0

    def add(self, mean: Tensor, count: float) -> None:
        """Adds a mean over ``count`` targets; one over no target adds nothing, whatever its value."""
        if count:
            self.total = self.total.to(mean.device) + mean.detach().double() * count
            self.count += count


def token_weight(count: float, total: float, world_size: int) -> float:
    """The factor on a rank's mean: n_w * W / N, and 0 for a step without a single target."""
    return count * world_size / total if total else 0.0
