r"""How the means of all ranks add up to the exact mean over the targets of an optimizer step.

Rank w has n_wm targets in micro-batch m, and the module returns their mean L_wm = sum(l) / n_wm. One process would
minimise this loss over the whole step:

    L = (1 / N) * sum_{w, m} n_wm * L_wm,        N = sum_{w, m} n_wm.

DeepSpeed without ``mpu`` averages gradients over all W processes, at every ZeRO stage. With ``scale_wrt_gas=False`` it
sums them over micro-batches. So each rank back-propagates L_wm * n_wm * W / N. N counts the targets of all
micro-batches of the step on all data-parallel ranks.

Example: W = 2 ranks and one micro-batch, with 3 and 1 targets. N = 4, and the weights are 3 * 2 / 4 = 1.5 and 0.5.

A plan may join the sequence inside the model. Then each of the P ranks of a group computes the loss of the whole batch,
over all its n targets. Each rank counts for n / P targets, so N stays the number of targets. The formula still holds,
since the P equal losses add up to n * L. `exchange.cut_and_join` shows that the gradients add up as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """The mean over the targets of many batches and ranks, kept as a sum and a count in float64.

    Each rank adds the means over its own targets, and `compute` sums over ranks. Both states are saved with the metric.
    To save the sum over ranks, save within `sync_context`.

    Args:
        **kwargs: Arguments of ``torchmetrics.Metric``. ``process_group`` is the group to sum over, by default all
            ranks.
    """

    # Updates do not depend on the state, so torchmetrics need not run each of them twice in `forward`.
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def update(self, mean: Tensor, targets: float | Tensor) -> None:
        """Adds one or several means over ``targets`` targets. A mean over no target is ignored, even if it is NaN.

        Args:
            mean: Means of any shape, on the device of the metric.
            targets: A number for all means, or a tensor that expands to their shape.
        """
        means = mean.detach().double()
        weights = targets.expand_as(means) if isinstance(targets, Tensor) else torch.full_like(means, targets)
        self.total += torch.where(weights > 0, means * weights, 0.0).sum()
        self.count += weights.sum()

    def compute(self) -> Tensor:
        """The mean, () float32. NaN if there is no target."""
        return (self.total / self.count).float()
