"""Models that mix tokens outside of attention, and what refuses them."""

from __future__ import annotations

from typing import Any

import pytest
from models import HandWritten, pair_batch
from torch import Tensor, nn

from lightning_ulysses import UlyssesError, sequence_positions
from lightning_ulysses.testing import SplitRun, fit_rank

PAIRS = [pair_batch(seed, 40) for seed in range(2)]


class Between(HandWritten):
    """A hand-written model with one more layer behind its embedding."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.between = make(self.embed.embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self.embed(x) + self.place(sequence_positions(x)))
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class Conv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.conv(h.transpose(1, 2)).transpose(1, 2)


def refused(rank: int, make: Any, run: SplitRun) -> UlyssesError:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, make, PAIRS, run)
    return caught.value
