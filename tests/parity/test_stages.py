"""Image networks of stages with attention written by hand: blocks with fewer tokens than ranks are left alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from exact import BOUND, refused
from torch import Tensor, nn

from lightning_ulysses.checks.trial import joints
from lightning_ulysses.checks.trial.blocks import BlockFinder
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

# As many features as tokens in the first stage, so that sizes alone do not tell them apart.
WIDTH, RUN = 16, SplitRun()


class Reduced(nn.Module):
    """Attention to the means of four neighbours in the image, which needs all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, height: int) -> Tensor:
        # (B, S, V) -> (B, V, height, height) -> (B, S / 4, V)
        image = x.transpose(1, 2).reshape(len(x), WIDTH, height, height)
        means = F.avg_pool2d(image, 2, ceil_mode=True).flatten(2).transpose(1, 2)
        return (self.q(x) @ self.k(means).transpose(1, 2)).softmax(-1) @ means


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Reduced(), nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, height: int) -> Tensor:
        x = x + self.attention(self.norm(x), height)
        return x + self.mlp(x)


class Pyramid(L.LightningModule):
    """16 tokens of an image in two blocks, then one token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 5)
        self.wide, self.narrow = (nn.ModuleList(Block() for _ in range(count)) for count in (2, 1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # (B, 3, 16, 16) -> (B, V, 4, 4) -> (B, 16, V)
        x = self.patches(batch["pixel_values"]).flatten(2).transpose(1, 2)
        for block in self.wide:
            x = block(x, 4)
        x = x.mean(1, keepdim=True)
        for block in self.narrow:
            x = block(x, 1)
        return F.cross_entropy(self.head(x[:, 0]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Convolutions(Pyramid):
    """Without a sequence."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.patches(batch["pixel_values"]).mean((2, 3))), batch["labels"])


BATCH = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
BATCH["labels"] = torch.tensor([0, 3, 4])


def test_one_step(pool: ProcessPool) -> None:
    reference = fit_single(Pyramid, [[BATCH]], lambda batch: float(len(batch["labels"])))
    assert reference.step().norm() > 1e-3
    for result in fit_split(pool, Pyramid, [BATCH], RUN):
        assert compare(result, reference).largest <= BOUND


def broken(rank: int, target: str, replacement: Callable[..., Any]) -> str:
    with mock.patch(f"lightning_ulysses.checks.trial.{target}", replacement):
        return refused(rank, Pyramid, [BATCH], RUN)


def all_blocks(finder: BlockFinder, sp_size: int, plans: Callable[..., Any] = BlockFinder.plans) -> Any:
    return plans(finder, 1)


def by_size(*args: Any, dims: Callable[..., Any] = joints._output_dims) -> Any:
    return dims(*args[:3], {})


@pytest.mark.parametrize(
    ("target", "replacement"),
    [("blocks.BlockFinder.plans", all_blocks), ("joints._output_dims", by_size)],
    ids=["one token in a block", "features and tokens alike"],
)
def test_neither_can_be_split(pool: ProcessPool, target: str, replacement: Any) -> None:
    for message in pool.run(broken, target, replacement, world_size=2):
        assert "is another step where its blocks are split" in message


def test_a_network_without_a_sequence_is_told_so(pool: ProcessPool) -> None:
    for message in pool.run(partial(refused, make=Convolutions, batches=[BATCH], run=RUN), world_size=2):
        assert "Convolutions calls no attention, nor another function that is divided over ranks" in message
        assert "train it without sequence parallelism (sp_size=1)" in message
