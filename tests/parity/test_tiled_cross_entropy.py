"""A step whose loss is `tiled_cross_entropy`, on several processes, against all logits on one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from exact import BOUND, check, fit_broken, no_weight
from models import HandWritten, count_targets, pair_batch
from nightly import mostly
from torch import Tensor, nn

import lightning_ulysses
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool, RemoteError


class Tiled(HandWritten):
    """One process computes all logits."""

    def __init__(self, loss: str = "plain") -> None:
        super().__init__(kv_heads=2)
        self.kind = loss
        if loss == "two layers":
            self.head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), self.head)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        head, self.head = self.head, nn.Identity()
        try:
            hidden = self(x)
        finally:
            self.head = head
        cap = 3.0 if self.kind == "softcap" else None
        if self._trainer is None:
            logits = self.head(hidden).flatten(0, 1)
            return F.cross_entropy(logits if cap is None else cap * (logits / cap).tanh(), y.flatten())
        reduction = "none" if self.kind == "masked" else "mean"
        loss = lightning_ulysses.tiled_cross_entropy(
            hidden, self.head, y, tile_tokens=3, softcap=cap, reduction=reduction
        )  # fmt: skip
        return loss.sum() / (y != -100).sum() if self.kind == "masked" else loss


def run(stage: int, accumulate: int = 1, **strategy: Any) -> SplitRun:
    return SplitRun(strategy={"stage": stage, **strategy}, trainer={"accumulate_grad_batches": accumulate})


def batches(count: int) -> list[Any]:
    return [pair_batch(seed, 33, 2, "uneven") for seed in range(count)]


CASES: dict[str, tuple[Any, list[Any], SplitRun, int]] = {
    "stage 1, accumulation": (Tiled, batches(2), run(1, 2), 1),
    "stage 2, softcap": (partial(Tiled, "softcap"), batches(2), run(2), 2),
    "stage 2, each loss by itself": (partial(Tiled, "masked"), batches(1), run(2), 1),
    "stage 3, accumulation": (Tiled, batches(2), run(3, 2), 1),
    "stage 2, a head that is tried": (partial(Tiled, "two layers"), batches(2), run(2), 2),
    "stage 3, a head that is tried": (
        partial(Tiled, "two layers"), batches(2), run(3, memory={"tiled_loss": ["head"], "tile_tokens": 5}), 2,
    ),
    "stage 3, each loss by itself": (partial(Tiled, "masked"), batches(1), run(3), 1),
    "a slice without a label": (Tiled, [pair_batch(1, 32, 1, "first_half")], run(2), 1),
    "split inside": (Tiled, batches(1), run(2, split="blocks"), 1),
}  # fmt: skip


SELDOM = ("stage 1, accumulation", "stage 2, a head that is tried", "stage 3, each loss by itself")


@pytest.mark.parametrize("name", mostly(CASES, SELDOM))
def test_step(pool: ProcessPool, name: str) -> None:
    make, data, run, steps = CASES[name]
    check(pool, make, data, run, steps)


def test_a_head_that_is_gathered_in_parts_is_refused(pool: ProcessPool) -> None:
    with pytest.raises(RemoteError, match=r"set memory in the strategy|set_z3_leaf_module"):
        fit_split(pool, partial(Tiled, "two layers"), batches(1), run(3))


def test_without_weights_it_is_off(pool: ProcessPool) -> None:
    """The negative control."""
    data = batches(2)
    wanted = fit_single(Tiled, [data], count_targets)
    target = "lightning_ulysses.loss.weights.token_weight"
    for found in pool.run(fit_broken, Tiled, data, run(2, 2), target, no_weight, world_size=2):
        assert compare(found, wanted).largest > 100 * BOUND
