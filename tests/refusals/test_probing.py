"""Models that mix tokens outside of attention, or restart their positions: exact, or refused by the module's name."""

from __future__ import annotations

import math
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from exact import BOUND
from mixing import PAIRS, Between, Conv, refused
from models import HandWritten, LlamaModule, count_targets, hand_written, llama, token_batch
from nightly import mostly
from torch import Tensor, nn

from lightning_ulysses import UlyssesError
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

TOKENS = [token_batch(seed, 40) for seed in range(2)]
CUT = SplitRun(strategy={"split": "batch"})


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.gru(h)[0]


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h.transpose(1, 2)).transpose(1, 2)


class Scan(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, h: Tensor) -> Tensor:
        return h + h.cumsum(dim=1) / h.shape[1]


class ByHand(nn.Module):
    """Attention that nothing intercepts, beside attention that is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        return h + (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Chunks(nn.Module):
    """Centers chunks of four tokens, which the slices of some sequences are made of."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, h: Tensor) -> Tensor:
        # (B, S, W) -> (B, S / 4, 4, W) -> (B, S, W)
        pad = F.pad(h, (0, 0, 0, -h.shape[1] % 4)).unflatten(1, (-1, 4))
        return (pad - pad.mean(2, keepdim=True)).flatten(1, 2)[:, : h.shape[1]]


class Gated(nn.Module):
    """Mixes tokens in a branch that begins at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv1d(width, width, 3, padding=1), nn.Parameter(torch.zeros(1))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.gate * self.conv(h.transpose(1, 2)).transpose(1, 2)


class ZeroConv(Conv):
    """Returns zeros in the first step."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ZeroGate(nn.Module):
    """The same, without a submodule that mixes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.gate * h.roll(1, dims=1)


class Arange(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(64, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.table(torch.arange(h.shape[1], device=h.device))


class Rotary(nn.Module):
    """Positions that only queries and keys see."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h)[:, None].chunk(3, dim=-1)
        angle = torch.arange(h.shape[1], device=h.device)[:, None] / 7
        q, k = (torch.cat([t * angle.cos(), t * angle.sin()], dim=-1) for t in (q, k))
        return h + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


class Outside(HandWritten):
    """Positions counted in the step itself, and submodules called one by one."""

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        h = self.embed(x) + self.place(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


class ZeroHead(HandWritten):
    """A loss of rows that does not depend on attention in the first step."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).transpose(1, 2), y, reduction="none").mean(1).square().mean()


class Beside(HandWritten):
    """Adds a loss of pooled tokens that attention has not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = nn.Linear(self.embed.embedding_dim, 1)

    def _loss(self, batch: Any) -> Tensor:
        return super()._loss(batch) + self.pooled(self.embed(batch[0]).mean(1)).square().mean()


def between(layer: Any) -> Any:
    return partial(Between, layer)


class Running(HandWritten):
    """Adds up tokens in the step itself, where no submodule could be given all of them."""

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        h = self.embed(x).cumsum(1)
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


# What runs on more than a slice.
MENDED: dict[str, tuple[Any, str]] = {
    "convolution": (between(Conv), "between.conv (Conv1d) get the few tokens"),
    "recurrence": (between(Recurrent), "between.gru (GRU)"),
    "batch norm": (between(Norm), "between.norm (BatchNorm1d)"),
    "scan": (between(Scan), "between (Scan)"),
    "attention by hand": (between(ByHand), "between (ByHand)"),
    "chunks": (between(Chunks), "between (Chunks)"),
    "a branch at zero": (between(Gated), "between.conv (Conv1d) get the few tokens"),
    "a convolution at zero": (between(ZeroConv), "between.conv (Conv1d) get the few tokens"),
    "a gate at zero": (between(ZeroGate), "between (ZeroGate)"),
    "arange": (between(Arange), "between (Arange)"),
    "rotary arange": (between(Rotary), "between (Rotary)"),
}
REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a head at zero": (ZeroHead, ("no mean over tokens",)),
    "a loss beside attention": (Beside, ("no mean over tokens",)),
    "arange in the step": (Outside, ("'place' (Embedding)", "sequence_positions(x)")),
    "a sum in the step": (Running, ("'blocks.0.norm1' (LayerNorm)", "sp_size=1")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_rank_refuses_what_cannot_be_split(pool: ProcessPool, case: str) -> None:
    make, parts = REFUSED[case]
    for error in pool.run(refused, make, CUT, world_size=2):
        assert [part for part in parts if part not in str(error)] == [], error


FOUR = SplitRun(4, 4, {"stage": 3})


def fit_and_listen(rank: int, make: Any, run: SplitRun) -> tuple[StepResult, str]:
    said: list[str] = []
    with mock.patch("lightning_ulysses.strategy.rank_zero_info", said.append):
        result = fit_rank(rank, make, PAIRS, run)
    return result, " ".join(said)


@pytest.mark.parametrize("case", MENDED)
def test_what_mixes_tokens_runs_on_more_than_a_slice(pool: ProcessPool, case: str) -> None:
    make, part = MENDED[case]
    reference = fit_single(make, [[batch] for batch in PAIRS], count_targets)
    results = pool.run(fit_and_listen, make, CUT, world_size=2)
    assert part in results[0][1] and part not in results[1][1], results[0][1]
    for result, _ in results:
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


DEFAULTS = [
    *((case, SplitRun()) for case in {**MENDED, **REFUSED}),
    *((case, FOUR) for case in ("convolution", "a loss beside attention", "arange in the step")),
]
# What is mended is also tried above; these are split inside.
SELDOM = [(case, SplitRun()) for case in [*MENDED][1:]] + DEFAULTS[-2:]


@pytest.mark.parametrize(("case", "run"), mostly(DEFAULTS, SELDOM))
def test_by_default_they_are_split(pool: ProcessPool, case: str, run: SplitRun) -> None:
    """What mixes tokens lies outside of the blocks that are split, or is given more than a slice."""
    make: Any = {**MENDED, **REFUSED}[case][0]
    reference = fit_single(make, [[batch] for batch in PAIRS], count_targets)
    for result in fit_split(pool, make, PAIRS, run):
        assert compare(result, reference).largest <= BOUND, compare(result, reference)


def validated(rank: int, make: Any) -> str:
    trainer = split_trainer(CUT)
    with pytest.raises(UlyssesError) as caught:
        trainer.validate(make(), split_loader(PAIRS, CUT, rank), verbose=False)
    return str(caught.value)


class Measuring(Running):
    """Validates by a metric, without a loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        h = self(batch[0]).cumsum(1)
        self.log("largest", self.blocks[0](h[..., :32]).max().item())


def test_evaluation_alone_is_refused_too(pool: ProcessPool) -> None:
    for text in pool.run(validated, Measuring, world_size=2):
        assert "validation_step" in text and "'blocks.0.norm1' (LayerNorm)" in text, text


class WithoutAttention(HandWritten):
    """Trains with attention, and validates without any."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.head(self.embed(batch[0]).cumsum(1)).flatten(0, 1), batch[1].flatten()))


def validated_after_training(rank: int) -> str:
    trainer, loader = split_trainer(CUT), split_loader(PAIRS, CUT, rank)
    with pytest.raises(UlyssesError) as caught:
        trainer.fit(WithoutAttention(), loader, loader)
    return str(caught.value)


def test_an_evaluation_without_attention_is_refused_too(pool: ProcessPool) -> None:
    for text in pool.run(validated_after_training, world_size=2):
        assert "validation_step" in text and "'head' (Linear)" in text, text


def test_the_same_without_the_check_trains_wrongly(pool: ProcessPool) -> None:
    make = between(Conv)
    reference = fit_single(make, [[batch] for batch in PAIRS], count_targets)
    run = SplitRun(strategy={"check_model": False, "split": "batch"})
    assert compare(fit_split(pool, make, PAIRS, run)[0], reference).step > 1e-3


def test_zero_3_and_four_ranks(pool: ProcessPool) -> None:
    for error in pool.run(refused, Running, SplitRun(4, 4, {"stage": 3, "split": "batch"}), world_size=4):
        assert "'blocks.0.norm1' (LayerNorm)" in str(error)


def layer(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)


class Collecting(Between):
    """Collects a part of the loss from a submodule in a list that the step empties, and counts calls."""

    def __init__(self) -> None:
        super().__init__(Noting)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.between.found.clear()
        loss = super().training_step(batch, batch_idx)
        assert self.between.calls == batch_idx + 1
        return loss + torch.stack(self.between.found).sum() / len(self.between.seen)


class Noting(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self.seen: set[str] = set()
        self.calls = 0

    def forward(self, h: Tensor) -> Tensor:
        self.found.append(h.pow(2).mean())
        self.seen.add(f"{h.requires_grad}")
        self.calls += 1
        return h


EXACT: dict[str, tuple[Any, list[Any], SplitRun]] = {
    "losses in a list": (Collecting, PAIRS, SplitRun()),
    "nothing between": (between(nn.LayerNorm), PAIRS, SplitRun()),
    "an encoder layer": (between(layer), PAIRS, SplitRun(4, 4)),
    "bf16 weights": (llama(), TOKENS, SplitRun(trainer={"precision": "bf16-true"})),
    "manual": (hand_written(manual=True), PAIRS, SplitRun(strategy={"stage": 3})),
}


@pytest.mark.parametrize("case", EXACT)
def test_the_check_leaves_the_step_alone(pool: ProcessPool, case: str) -> None:
    """Bitwise: parameters, buffers and random numbers are as without it."""
    make, batches, run = EXACT[case]
    with_check = fit_split(pool, make, batches, run)[0]
    off = SplitRun(run.world_size, run.sp_size, {**run.strategy, "check_model": False}, run.trainer)
    without = fit_split(pool, make, batches, off)[0]
    assert with_check.losses == without.losses
    assert torch.equal(with_check.step(), without.step()) and with_check.step().norm() > 0


class Dropping(LlamaModule):
    """Draws random numbers in every step."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (1 + torch.rand(()))


def test_random_numbers_are_left_alone(pool: ProcessPool) -> None:
    losses = [
        fit_split(pool, Dropping, TOKENS, SplitRun(strategy={"check_model": on}))[0].losses for on in (True, False)
    ]
    assert losses[0] == losses[1]
