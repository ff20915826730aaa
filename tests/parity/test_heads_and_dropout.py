"""Every ratio of query to key/value heads, values of another size than keys, and dropout inside of attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND
from models import Block, HandWritten, LlamaModule, count_targets, llama, pair_batch, token_batch
from nightly import mostly
from torch import Tensor, nn

from lightning_ulysses import ulysses_attention
from lightning_ulysses.testing import (
    SplitRun,
    StepResult,
    compare,
    fit_rank,
    fit_single,
    fit_split,
    split_loader,
    split_trainer,
)
from lightning_ulysses.testing.processes import ProcessPool


class WideValues(HandWritten):
    """Values of ``value_size`` entries, keys of 8."""

    def __init__(self, kv_heads: int, value_size: int, call: str) -> None:
        super().__init__(heads=4, kv_heads=kv_heads)
        torch.manual_seed(2)
        self.value_size, self.kv_heads, self.way = value_size, kv_heads, call
        self.values = nn.ModuleList([nn.Linear(8, value_size) for _ in self.blocks])
        self.narrow = nn.ModuleList([nn.Linear(value_size, 8) for _ in self.blocks])
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.attend = partial(self.attend, index)  # type: ignore[method-assign]

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = self.values[index](v)
        if self.way == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != 4)
        else:
            out = ulysses_attention(q, k, v, is_causal=True)
        narrow: Tensor = self.narrow[index](out)
        return narrow


@pytest.mark.parametrize(
    ("kv_heads", "value_size", "call", "run"),
    [
        (4, 5, "sdpa", SplitRun()),
        (2, 12, "explicit", SplitRun()),
        (1, 3, "sdpa", SplitRun(3, 3)),
        (4, 12, "explicit", SplitRun(3, 3, {"stage": 3})),
    ],
)
def test_values_of_another_size(pool: ProcessPool, kv_heads: int, value_size: int, call: str, run: SplitRun) -> None:
    make, batches = partial(WideValues, kv_heads, value_size, call), [pair_batch(1, 33, 2, "uneven")]
    reference = fit_single(make, [batches], count_targets)
    for result in fit_split(pool, make, batches, run):
        assert compare(result, reference).largest <= BOUND


@pytest.mark.parametrize(
    ("world", "kv_heads"), mostly([(2, 1), (2, 2), (3, 2), (3, 4), (4, 1), (4, 4)], [(2, 2), (4, 4)])
)
def test_grouped_heads(pool: ProcessPool, kv_heads: int, world: int) -> None:
    make, batches = llama(heads=4, kv_heads=kv_heads), [token_batch(1, 33, 3, "uneven")]
    reference = fit_single(make, [batches], count_targets)
    for result in fit_split(pool, make, batches, SplitRun(world, world)):
        assert compare(result, reference).largest <= BOUND


ROWS, H, S, D, RATE = 300, 4, 8, 2, 0.25


class Dropping(HandWritten):
    """Notes what attention with dropout gives on one known sequence, repeated in every row: ROWS draws at once."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.out = rate, torch.empty(0)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        # (B, S_r) numbers of tokens -> (B, H, S_r, D); values of all ones, so that the output counts what is kept
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(3, S, H, D, generator=generator)
        q, k, v = table[:, x].transpose(2, 3)
        self.out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate).detach()
        self.kept = F.scaled_dot_product_attention(q * 0, k * 0, torch.ones_like(v), dropout_p=self.rate).detach()
        return super().training_step(batch, batch_idx)


def draws(rank: int, rate: float) -> tuple[Tensor, Tensor]:
    """Attention (B, H, S_r, D), and for each draw, query and head the share of keys that was kept."""
    torch.manual_seed(3)
    module, run = Dropping(rate), SplitRun()
    x = torch.arange(S).expand(ROWS, S).contiguous()
    split_trainer(run).fit(module, split_loader([(x, x)], run, rank))
    return module.out, module.kept


def test_dropout_inside_attention(pool: ProcessPool) -> None:
    (first, kept_0), (second, kept_1) = pool.run(draws, RATE, world_size=2)
    (plain_0, _), (plain_1, _) = pool.run(draws, 0.0, world_size=2)
    found, wanted = torch.cat([first, second], dim=2), torch.cat([plain_0, plain_1], dim=2)
    assert found.shape == (ROWS, H, S, D)
    # The mean over draws is attention without dropout, within five standard errors.
    error = found.std(dim=0) / ROWS**0.5
    assert ((found.mean(dim=0) - wanted.mean(dim=0)).abs() <= 5 * error + 1e-6).all()
    assert found.std(dim=0).max() > 0.1 and wanted.std(dim=0).max() < 1e-6
    # A share RATE is dropped, and what is kept is scaled up.
    kept = torch.cat([kept_0, kept_1], dim=2)[..., 0]  # (B, H, S)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    dropped = 1 - (kept * (1 - RATE)).mean().item()
    assert dropped == pytest.approx(RATE, abs=0.02)


def test_heads_draw_dropout_masks_of_their_own(pool: ProcessPool) -> None:
    """Also heads of different ranks, which would draw alike from one seed."""
    outputs: list[Any] = pool.run(draws, RATE, world_size=2)
    kept = torch.cat([out[1] for out in outputs], dim=2)[..., 0]  # (B, H, S)
    by_head = kept.transpose(0, 1).flatten(1)  # (H, B * S)
    correlation = torch.corrcoef(by_head)
    assert (correlation - torch.eye(H)).abs().max() < 0.15


class Recomputed(LlamaModule):
    """Dropout in attention, with and without activation checkpointing."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__(lr=0.1)
        for layer in self.model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def seeded(rank: int, checkpointing: bool, batches: list[Any]) -> StepResult:
    make = partial(Recomputed, checkpointing)
    torch.manual_seed(3)
    return fit_rank(rank, make, batches, SplitRun())


def test_a_second_forward_drops_the_same(pool: ProcessPool) -> None:
    batches = [token_batch(seed, 33) for seed in range(2)]
    kept, again = (pool.run(seeded, checkpointing, batches, world_size=2)[0] for checkpointing in (False, True))
    assert compare(again, kept).largest <= BOUND
    plain = fit_split(pool, llama(lr=0.1), batches, SplitRun())[0]
    assert compare(kept, plain).step > 1e-3
