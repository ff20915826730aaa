"""What a step draws: the same for a whole sample on all ranks of a group, and otherwise for each rank's tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import HandWritten, pair_batch
from nightly import mostly
from torch import Tensor, nn

from lightning_ulysses.testing import SplitRun, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

# S is odd, so that one rank of a group draws for more tokens than the other.
BATCHES = [pair_batch(seed, 33, 2) for seed in range(8)]


class Drawing(HandWritten):
    """Drops features of tokens and of samples, draws a noise level, and has a block run first at random."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.drop = nn.Dropout(0.5)
        self.kept: list[Tensor] = []
        self.levels: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        # (B, S_r, 8); before anything for the sample, so that it shows whether tokens shift what is drawn next
        self.kept.append(self.drop(torch.ones(*x.shape, 8)).bool())
        condition = self.drop(torch.ones(len(x), 20))
        self.levels.append(torch.cat([condition.flatten(), torch.rand(len(x)), torch.tensor(np.random.rand(1))]))
        if torch.rand(()) < 0.5:
            self.blocks = self.blocks[::-1]
        return super().training_step(batch, batch_idx)


def draw(
    rank: int, run: SplitRun, seed: int | None = None, saver: Any = None, path: str | None = None
) -> tuple[list[Tensor], list[Tensor], bool]:
    """What is kept, the levels, and whether the process's own stream is where it was."""
    # A run before this one may have left it, and Lightning would seed all ranks alike.
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.manual_seed(1000 + rank)
    if seed is not None:
        L.seed_everything(seed, verbose=False)
    module = Drawing()
    before = torch.get_rng_state()
    trainer = split_trainer(run, [saver] if saver is not None else [])
    trainer.fit(module, split_loader(BATCHES, run, rank), ckpt_path=path)
    return module.kept, module.levels, torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", mostly([None, 5], [None]))
def test_a_group_draws_alike_for_samples_and_otherwise_for_tokens(pool: ProcessPool, seed: int | None) -> None:
    kept, levels, untouched = zip(*pool.run(draw, SplitRun(4, 2), seed, world_size=4), strict=True)
    for first, second in ((0, 1), (2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(levels[first], levels[second], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(levels[0], levels[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(levels[0], levels[0][1:], strict=False))
    masks = [torch.cat([mask[:, :16].flatten() for mask in masks]).float() for masks in kept]
    correlation = torch.corrcoef(torch.stack(masks)) - torch.eye(4)
    assert correlation.abs().max() < 0.1 and 0.45 < torch.cat(masks).mean() < 0.55
    # A seeded run is seeded again when it starts.
    assert seed is not None or all(untouched)


def test_a_resumed_run_draws_the_same(pool: ProcessPool, tmp_path: Path) -> None:
    whole = pool.run(draw, SplitRun(), 5, world_size=2)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="middle", every_n_train_steps=3, save_top_k=-1)
    stopped = SplitRun(trainer={"max_steps": 3, "enable_checkpointing": True})
    pool.run(draw, stopped, 5, saver, world_size=2)
    rest = pool.run(draw, SplitRun(), 5, None, f"{tmp_path}/middle.ckpt", world_size=2)
    for (kept, levels, _), (kept_again, levels_again, _) in zip(whole, rest, strict=True):
        assert len(levels_again) == len(BATCHES) - 3
        assert all(torch.equal(a, b) for a, b in zip(levels[3:], levels_again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(kept[3:], kept_again, strict=True))
