"""Checkpoints that are saved within an evaluation, as a scheduler's signal has Lightning do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from models import LlamaModule, token_batch
from nightly import mostly

from lightning_ulysses import TokenCountMonitor
from lightning_ulysses.testing import SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool


class Within(L.Callback):
    """Saves once, within the first evaluation, and keeps the losses of all of them."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.losses: list[float] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.path and batch_idx == 1 and not self.losses:
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["validate/loss"]))


def fit(rank: int, path: str, every: int) -> tuple[list[float], list[float]]:
    """The losses of a run's evaluations, and of those that follow when it is resumed within the first."""
    run = SplitRun(trainer={"max_epochs": 2, "val_check_interval": every})
    batches = [token_batch(seed, 33, 1, "uneven") for seed in range(4)]
    losses = []
    for saved, resumed in ((path, None), (None, path)):
        within = Within(saved)
        trainer = split_trainer(run, [TokenCountMonitor(report=False), within])
        loaders = [split_loader(batches, run, rank) for _ in range(2)]
        trainer.fit(LlamaModule(lr=0.1), *loaders, ckpt_path=resumed)
        losses.append(within.losses)
    return losses[0], losses[1]


@pytest.mark.parametrize("every", mostly([2, 4], [4]))
def test_the_evaluations_that_follow_are_whole(pool: ProcessPool, tmp_path: Path, every: int) -> None:
    """Lightning goes on with training, and does not continue the one that was cut short."""
    for straight, resumed in pool.run(fit, str(tmp_path / "within.ckpt"), every, world_size=2):
        assert len(straight) == 8 // every
        assert resumed == pytest.approx(straight[1:], rel=1e-6)
