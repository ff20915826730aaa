"""Epochs that end inside an accumulation window: what no step has used is dropped, as in plain Lightning."""

from __future__ import annotations

from typing import Any

import pytest
from exact import BOUND
from models import LlamaModule, count_targets, token_batch
from nightly import mostly

from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool


class Stops(LlamaModule):
    """Ends the first epoch after its first batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 and self.current_epoch == 0 else None


@pytest.mark.parametrize(
    "strategy",
    mostly(
        [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 2, "offload_optimizer": True}, {"loss_weighting": "none"}],
        [{"stage": 1}, {"stage": 2}],
    ),
    ids=str,
)
def test_an_epoch_that_the_module_ends(pool: ProcessPool, strategy: dict[str, Any]) -> None:
    labels = "even" if "loss_weighting" in strategy else "uneven"
    batches = [token_batch(seed, 33, 2, labels) for seed in range(4)]
    # S = 33 gives a rank 17 or 16 tokens, whose plain mean is not the token mean.
    if labels == "even":
        batches = [{key: value[:, :32] for key, value in batch.items()} for batch in batches]
        for batch in batches:
            batch["labels"][:, 16] = -100
    wanted = fit_single(LlamaModule, [batches[:2], batches[2:]], count_targets)
    run = SplitRun(2, 2, strategy, {"accumulate_grad_batches": 2, "max_epochs": 2})
    for result in fit_split(pool, Stops, batches, run):
        assert compare(result, wanted).largest <= BOUND
