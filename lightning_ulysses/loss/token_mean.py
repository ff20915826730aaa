r"""How local means add up to the exact token mean of an optimizer step.

Rank w holds n_w targets of micro-batch m and the module returns their mean, L_wm = sum(l) / n_wm. What one process
would minimise over the whole step is

    L = (1 / N) * sum_{w, m} n_wm * L_wm,        N = sum_{w, m} n_wm.

DeepSpeed without ``mpu`` averages gradients over all W processes, at every ZeRO stage and with ``scale_wrt_gas=False``
sums them over micro-batches, so each rank back-propagates L_wm * n_wm * W / N. N spans every micro-batch of the step on
every data-parallel rank; a rank's own mean never enters it.

Where a plan joins the sequence inside the model, each of the P ranks of a group computes the loss of the whole batch,
over all its n targets. Each counts for n_w = n / P of them, so that N stays the number of targets, and the same formula
holds: the P equal losses add up to n * L. That their gradients do as well is shown in `exchange.cut_and_join`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """A mean over targets that are spread over batches and ranks, kept as a sum and a count in float64.

    Each rank adds the means over its own targets, and `compute` adds up the ranks. Both states are saved with the
    metric; a sum over ranks is saved from within `sync_context`.

    Args:
        **kwargs: Arguments of ``torchmetrics.Metric``. ``process_group`` holds the ranks to add up, all by default.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def update(self, mean: Tensor, targets: float | Tensor) -> None:
        """Adds one or several means over ``targets`` targets; one over no target adds nothing, whatever its value.

        Args:
            mean: Of any shape; on the device of the metric.
            targets: A number for all of them, or a tensor that expands to the same shape.
        """
        means = mean.detach().double()
        weights = targets.expand_as(means) if isinstance(targets, Tensor) else torch.full_like(means, targets)
        self.total += torch.where(weights > 0, means * weights, 0.0).sum()
        self.count += weights.sum()

    def compute(self) -> Tensor:
        """The mean, () float32; NaN without a target."""
        return (self.total / self.count).float()
