"""Ranks of one sequence group see one sample; other groups see others."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from models import VOCAB, HandWritten
from nightly import mostly
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ulysses.testing import SplitRun, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

S = 33


class Rotated(Dataset[tuple[Tensor, Tensor]]):
    """Counts up from a place that is drawn at random each time."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = (torch.arange(S + 1) + torch.randint(0, VOCAB, ())) % VOCAB
        return row[:-1], row[1:]


class Recording(HandWritten):
    """Keeps the slices that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch[0].clone())
        return super().training_step(batch, batch_idx)


def record(rank: int, world_size: int, workers: int, seed: int | None) -> list[Tensor]:
    if seed is not None:
        L.seed_everything(seed, workers=True, verbose=False)
    else:
        torch.manual_seed(1000 + rank)
    module = Recording()
    torch.rand(rank)
    trainer = split_trainer(
        SplitRun(world_size, 2, trainer={"max_epochs": 1 if workers else 2, "use_distributed_sampler": True})
    )
    # A forked worker would inherit threads of the process group that spin.
    context = "spawn" if workers else None
    trainer.fit(module, DataLoader(Rotated(), batch_size=1, num_workers=workers, multiprocessing_context=context))
    return module.seen


def join(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The rows that two ranks of one group were trained on, which fit together."""
    # (1, S_r) of each rank -> (1, S)
    rows = [torch.cat(slices, dim=1) for slices in zip(first, second, strict=True)]
    for row in rows:
        assert row.shape == (1, S)
        assert torch.equal(row.diff(dim=1) % VOCAB, torch.ones(1, S - 1, dtype=torch.long))
    return rows


@pytest.mark.parametrize("seed", mostly([3, None], [3]))
def test_one_sample_per_group(pool: ProcessPool, seed: int | None) -> None:
    seen = pool.run(record, 4, 0, seed, world_size=4)
    rows, others = join(*seen[:2]), join(*seen[2:])
    assert len(rows) == 6
    assert not all(torch.equal(a, b) for a, b in zip(rows, others, strict=True))
    assert not torch.equal(rows[0], rows[3]), "the second epoch repeats the first one's augmentations"


def test_workers_of_a_group_draw_the_same(pool: ProcessPool) -> None:
    rows = join(*pool.run(record, 2, 1, None, world_size=2))
    assert len(rows) == 6
    assert len({int(row[0, 0]) for row in rows}) > 1


def test_seed_makes_runs_repeatable(pool: ProcessPool) -> None:
    first, second = (pool.run(record, 4, 0, 3, world_size=4) for _ in range(2))
    other = pool.run(record, 4, 0, 4, world_size=4)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))
