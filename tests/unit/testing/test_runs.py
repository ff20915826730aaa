"""The reference in one process."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_ulysses.testing import fit_single

# A sum of so many squares in float32 is off by 2e-3.
NUMBERS = 2**22


class Wide(L.LightningModule):
    """Has the gradient 0.1 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUMBERS))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("clip", [None, 2.0])
def test_the_norm_of_the_reference_is_taken_in_float64(clip: float | None) -> None:
    result = fit_single(Wide, [[torch.tensor(0.1)]], lambda batch: 1.0, clip=clip)
    assert result.grad_norms[0] == pytest.approx(0.1 * NUMBERS**0.5, rel=1e-7)
    wanted = result.grad_norms[0] if clip is None else clip
    assert float(result.step().norm()) == pytest.approx(wanted, rel=1e-6)
