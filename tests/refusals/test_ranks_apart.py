"""Ranks whose steps do not exchange alike are refused by the trial, and meet in no other collective."""

from __future__ import annotations

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


def fit(rank: int, patience: float) -> None:
    with mock.patch("lightning_ulysses.checks.trial.runs._LONG_PATIENCE", patience):
        fit_rank(rank, Apart, [token_batch(1, 33)], SplitRun())


def test_a_rank_that_waits_for_no_other_one_is_named(pool: ProcessPool) -> None:
    with pytest.raises(RemoteError) as failure:
        pool.run(fit, 3.0, world_size=2)
    assert failure.value.rank == 0 and isinstance(failure.value.cause, UlyssesError), failure.value
    assert "ended on this rank in its trial, and not on another one within 3 seconds" in str(failure.value.cause)
