"""A run on several processes against one."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import lightning as L
import pytest
from models import count_targets
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split, snapshot
from lightning_ulysses.testing.processes import ProcessPool

BOUND = 1e-5


def check(pool: ProcessPool, make: Any, batches: list[Any], run: SplitRun, steps: int = 1, **single: Any) -> None:
    size = math.ceil(len(batches) / steps)
    wanted = fit_single(make, [batches[i : i + size] for i in range(0, len(batches), size)], count_targets, **single)
    results = fit_split(pool, make, batches, run)
    assert wanted.step().norm() > 1e-3
    for result in results:
        assert compare(result, wanted).largest <= BOUND, compare(result, wanted)


def refused(rank: int, make: Any, batches: list[Any], run: SplitRun) -> str:
    """What a run is refused with."""
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, make, batches, run)
    return str(caught.value)


def fit_broken(rank: int, make: Any, batches: list[Any], run: SplitRun, target: str, replacement: Any) -> Any:
    """`fit_rank` with something replaced in the process: a negative control."""
    with mock.patch(target, replacement):
        return fit_rank(rank, make, batches, run)


def no_weight(count: float, total: float, world_size: int) -> float:
    return 1.0


def no_shift(*args: Any) -> dict[str, Any]:
    return {}


class Keep(L.Callback):
    """Whole parameters when training ends."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = snapshot(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.after = snapshot(pl_module)
