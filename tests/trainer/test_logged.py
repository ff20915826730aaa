"""Numbers that a step logs are those of one process, wherever the batch is cut."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch.nn.functional as F
from models import HandWritten, pair_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses.testing import QUIET, SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

BATCHES = [pair_batch(seed, 33, rows, "uneven") for seed, rows in ((1, 2), (2, 3), (3, 1), (4, 2))]


class Logging(HandWritten):
    """Logs as modules do that know of no slices."""

    def __init__(self, **log: Any) -> None:
        super().__init__(lr=0.0)
        self.how = log

    def measured(self, batch: Any, stage: str) -> Tensor:
        x, y = batch
        logits = self(x)
        loss, kept = F.cross_entropy(logits.flatten(0, 1), y.flatten()), y != -100
        self.log(f"{stage}_loss", loss, **self.how)
        right = (logits.argmax(-1) == y)[kept].float().mean()
        self.log_dict({f"{stage}_accuracy": right, f"{stage}_size": logits.pow(2).mean().item()}, **self.how)
        if stage == "val":
            # In training, a slice without any target shows the module one that stands in for them.
            self.log(f"{stage}_targets", kept.sum().float(), **self.how)
        self.log(f"{stage}_rate", 0.25, **self.how)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.measured(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.measured(batch, "val")


def metrics(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def logged(rank: int, make: Any, run: SplitRun) -> dict[str, float]:
    trainer = split_trainer(run)
    trainer.fit(make(), split_loader(BATCHES, run, rank), split_loader(BATCHES[:3], run, rank))
    return metrics(trainer)


def alone(make: Any, **kwargs: Any) -> dict[str, float]:
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, **{**QUIET, **kwargs})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(make(), split_loader(BATCHES, SplitRun(1, 1), 0), split_loader(BATCHES[:3], SplitRun(1, 1), 0))
    return metrics(trainer)


HOW: dict[str, dict[str, Any]] = {
    "as by default": {},
    "on step and on epoch": {"on_step": True, "on_epoch": True},
    "synchronised": {"on_epoch": True, "sync_dist": True},
}


RUNS = [*((how, SplitRun()) for how in HOW), ("on step and on epoch", SplitRun(3, 3, {"stage": 3}))]


@pytest.mark.parametrize(("how", "run"), mostly(RUNS, [("on step and on epoch", SplitRun())]))
def test_logged_numbers_are_those_of_one_process(pool: ProcessPool, how: str, run: SplitRun) -> None:
    make = partial(Logging, **HOW[how])
    wanted = alone(make)
    assert {"train_loss", "val_loss", "val_targets"} <= set(wanted)
    for found in pool.run(logged, make, run, world_size=run.world_size):
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            assert abs(found[name] - value) <= 1e-5 * max(abs(value), 1.0), (name, found[name], value)


def test_without_the_trial_they_are_those_of_a_slice(pool: ProcessPool) -> None:
    """The comparison can fail."""
    wanted = alone(Logging)["val_loss"]
    run = SplitRun(strategy={"check_model": False})
    assert any(abs(found["val_loss"] - wanted) > 1e-4 for found in pool.run(logged, Logging, run, world_size=2))


class Conditional(Logging):
    """One rank logs, and another does not."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == 0:
            self.measured(batch, "val")
        elif self.trainer.training:
            raise AssertionError

    def measured(self, batch: Any, stage: str) -> Tensor:
        loss = super().measured(batch, stage)
        # After the step that was tried, what is logged depends on the rank.
        if stage == "train" and self.global_rank == 0 and self.trainer.global_step:
            self.log("late", loss)
        return loss


def test_ranks_may_log_different_names(pool: ProcessPool) -> None:
    for found in pool.run(logged, Conditional, SplitRun(trainer={"limit_val_batches": 0}), world_size=2):
        assert abs(found["train_loss"] - alone(Logging)["train_loss"]) <= 1e-5


class Perplexed(Logging):
    def measured(self, batch: Any, stage: str) -> Tensor:
        loss = super().measured(batch, stage)
        self.log(f"{stage}_perplexity", loss.exp())
        return loss


def warned(rank: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logged(rank, Perplexed, SplitRun())
    return [
        str(warning.message) for warning in caught if "slices of the sequence do not add up" in str(warning.message)
    ]


def test_what_slices_do_not_add_up_to_is_named(pool: ProcessPool) -> None:
    first, other = pool.run(warned, world_size=2)
    assert len(first) == 2 and "'train_perplexity'" in first[0] + first[1] and other == []


def test_the_advice_of_the_warning_is_exact(pool: ProcessPool) -> None:
    wanted = alone(Perplexed)
    for found in pool.run(logged, Perplexed, SplitRun(strategy={"split": "blocks"}), world_size=2):
        for name in ("train_perplexity", "val_perplexity", "val_loss"):
            assert abs(found[name] - wanted[name]) <= 1e-4 * wanted[name]
