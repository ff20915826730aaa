"""Ranks whose steps do not exchange alike are refused by the trial, and meet in no other collective."""

from __future__ import annotations

import os
from functools import partial
from unittest import mock

import pytest
from models import LlamaModule, token_batch
from torch import Tensor

import lightning_ulysses
from lightning_ulysses import UlyssesError
from lightning_ulysses.testing import SplitRun, fit_rank
from lightning_ulysses.testing.processes import ProcessPool, RemoteError


class Apart(LlamaModule):
    """Exchanges tokens on one rank only, as code does that looks at what a slice holds."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            lightning_ulysses.gather_sequence(batch["input_ids"])
        loss: Tensor = self.model(**batch).loss
        return loss


class Frozen(LlamaModule):
    """Freezes one parameter on some ranks, at some place of a run."""

    def __init__(self, place: str, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.place, self.ranks = place, ranks
        self._freeze("__init__")

    def _freeze(self, place: str) -> None:
        if place == self.place and int(os.environ.get("RANK", 0)) in self.ranks:
            self.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)

    def on_train_start(self) -> None:
        self._freeze("on_train_start")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self._freeze(f"step {batch_idx}")
        loss: Tensor = self.model(**batch).loss
        return loss


def fit_frozen(rank: int, place: str, ranks: tuple[int, ...], stage: int) -> None:
    run = SplitRun(strategy={"stage": stage})
    fit_rank(rank, partial(Frozen, place, ranks), [token_batch(1, 33), token_batch(2, 33)], run)


@pytest.mark.parametrize(("place", "stage"), [("__init__", 3), ("on_train_start", 2), ("step 1", 1)])
def test_ranks_that_train_other_parameters_are_refused(pool: ProcessPool, place: str, stage: int) -> None:
    with pytest.raises(RemoteError) as failure:
        pool.run(fit_frozen, place, (1,), stage, world_size=2)
    message = str(failure.value.cause)
    assert isinstance(failure.value.cause, UlyssesError), failure.value
    assert "layers.0.mlp.up_proj.weight" in message and "the same requires_grad on every rank" in message


def test_what_all_ranks_freeze_is_left_alone(pool: ProcessPool) -> None:
    pool.run(fit_frozen, "step 1", (0, 1), 2, world_size=2)


def fit(rank: int, patience: float) -> None:
    with mock.patch("lightning_ulysses.checks.trial.runs._LONG_PATIENCE", patience):
        fit_rank(rank, Apart, [token_batch(1, 33)], SplitRun())


def test_a_rank_that_waits_for_no_other_one_is_named(pool: ProcessPool) -> None:
    with pytest.raises(RemoteError) as failure:
        pool.run(fit, 8.0, world_size=2)
    assert failure.value.rank == 0 and isinstance(failure.value.cause, UlyssesError), failure.value
    assert "ended on this rank in its trial, and not on another one within 8 seconds" in str(failure.value.cause)
