"""Ranks of a group that hold different batches, also later in a run and in tensors that are not cut."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from exact import fit_broken
from models import LlamaModule, token_batch

from lightning_ulysses import UlyssesError
from lightning_ulysses.batch.same_batch import _digest
from lightning_ulysses.testing import SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

BATCHES = [token_batch(seed, 33) for seed in range(5)]
MAKE = partial(LlamaModule, call="keywords")


class Loader:
    """From its second use on, each rank sees other data."""

    def __init__(self, rank: int) -> None:
        self.rank, self.uses = rank, 0

    def __iter__(self) -> Any:
        self.uses += 1
        for seed in range(4):
            yield token_batch(seed + self.rank * (self.uses > 1), 33)


def data(rank: int, case: str) -> tuple[list[Any], Any]:
    if case == "validation":
        return BATCHES, Loader(rank)
    if case == "whole tensor":
        return [{**batch, "scale": torch.tensor([1.0, rank])} for batch in BATCHES], None
    if case == "number":
        return [{**batch, "scale": rank} for batch in BATCHES], None
    return [*BATCHES[:4], token_batch(4 + rank, 33), *BATCHES * 2], None


def refused(rank: int, case: str) -> tuple[str, int]:
    settings: dict[str, Any] = {"sequence_dims": {"input_ids": 1, "labels": 1, "scale": None}}
    strategy = {**settings, "split": "batch", "stage": 3 if case == "stage 3" else 2}
    run = SplitRun(strategy=strategy, trainer={"check_val_every_n_epoch": None, "val_check_interval": 2})
    training, validation = data(rank, case)
    trainer = split_trainer(run)
    with pytest.raises(UlyssesError) as caught:
        trainer.fit(MAKE(), split_loader(training, run, rank), validation)
    return str(caught.value), trainer.global_step


@pytest.mark.parametrize(
    ("case", "steps"), [("whole tensor", 0), ("number", 0), ("later", 4), ("stage 3", 9), ("validation", 4)]
)
def test_every_rank_refuses(pool: ProcessPool, case: str, steps: int) -> None:
    """By a collective that is there anyway before the optimizer steps, and at stage 3 at the tenth batch."""
    for text, taken in pool.run(refused, case, world_size=2):
        assert "hold different batches" in text and "num_replicas" in text
        assert taken == steps


def nothing(batch: Any) -> int:
    return 0


def trained(rank: int) -> Any:
    training, _ = data(rank, "later")
    target = "lightning_ulysses.batch.same_batch._digest"
    return fit_broken(rank, MAKE, training, SplitRun(), target, nothing).losses


def test_without_digests_a_run_goes_on(pool: ProcessPool) -> None:
    first, second = pool.run(trained, world_size=2)
    assert len(first) == len(second) == 15


def test_digests_tell_values_shapes_and_numbers_apart() -> None:
    batch = {"x": torch.arange(6), "y": torch.rand(2, 3), "n": 3, "name": "a", "nested": [torch.ones(2)]}
    others = [
        {**batch, "x": torch.tensor([0, 1, 2, 3, 5, 4])},
        {**batch, "x": torch.arange(6).view(2, 3)},
        {**batch, "y": batch["y"] + 1e-6},
        {**batch, "n": 4},
        {**batch, "nested": [torch.zeros(2)]},
    ]
    assert len({_digest(each) for each in [batch, *others]}) == 6
    assert _digest(batch) == _digest({key: value.clone() if key in "xy" else value for key, value in batch.items()})
